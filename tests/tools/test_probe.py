"""The command line of the probe."""

import json
from pathlib import Path

import pytest

from region_pretrain.commands.probe import main

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/detection/faster_rcnn_r18_fpn_shapes.py"


def test_a_table_and_a_json_of_random_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Shapes is generated here
    config = str(ROOT / CONFIG)
    overrides = [
        "train.device=cpu",
        "train.output_dir=out",
        "dataloader.train.dataset.names.size=6",
        "dataloader.test.dataset.names.size=6",
    ]
    main(["--config-file", config, *overrides, "--k", "2", "--max-images", "4"])
    result = json.loads((tmp_path / "out/probe.json").read_text())
    assert (result["k"], result["train"]["images"], result["test"]["images"]) == (2, 4, 4)
    assert list(result["levels"]) == ["trunk", "fpn", "head"]
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("trunk "))
    assert row.split()[:3] == ["trunk", "random", "288"]


def test_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config-file", str(ROOT / CONFIG), "train.init_checkpont=x"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "train.init_checkpoint=output/mine/model_final.pth" in capsys.readouterr().out
