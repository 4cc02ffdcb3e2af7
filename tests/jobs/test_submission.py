import argparse
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog

from region_pretrain.engine.command_line import argument_parser
from region_pretrain.errors import UserError
from region_pretrain.jobs.submission import add_slurm_arguments, submit_training, wants_slurm

CONFIG = "configs/detection/mask_rcnn_r18_fpn_shapes.py"


def parse(*arguments: str) -> argparse.Namespace:
    parser = argument_parser("", "")
    add_slurm_arguments(parser)
    return parser.parse_intermixed_args(["--config-file", CONFIG, *arguments])


def submit(*arguments: str) -> None:
    submit_training(parse(*arguments), "tools/train_net.py")


def test_where_a_command_runs():
    assert not wants_slurm(parse()) and wants_slurm(parse("--slurm", "partition=gpu"))
    with pytest.raises(UserError, match="--dry-run shows what --slurm would submit"):
        wants_slurm(parse("--dry-run"))


def test_a_dry_run_shows_the_sbatch_file_and_leaves_nothing(tmp_path, capsys):
    settings = "partition=gpu,nodes=2,gpus-per-node=2"
    submit("--slurm", settings, "--dry-run", f"train.output_dir={tmp_path}/run")
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n")
    for line in ("partition=gpu", "nodes=2", "gpus-per-node=2", "ntasks-per-node=2"):
        assert f"#SBATCH --{line}\n" in text
    assert f"submitit.core._submit {tmp_path}/run/slurm\n" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slurm", "partion=gpu"], "did you mean partition"),
        (["--slurm", "partition=gpu", "--num-gpus", "8"], "use --slurm nodes=N,gpus-per-node=M"),
        (["--slurm", "gpus-per-node=7"], "must be a multiple of the 7 processes"),
        (["--slurm", "partition=gpu", "train.max_itr=3"], "did you mean train.max_iter"),
        (["--slurm", "partition=gpu", "train.output_dir={held}"], "already contains a run"),
        (["--slurm", "{local}"], "the file has kind=local, not slurm"),
    ],
)
def test_bad_input_is_refused_before_submission(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/config.yaml").write_text("")
    (tmp_path / "held/metrics.json").write_text("{}\n")
    (tmp_path / "local.py").write_text("cluster = dict(kind='local')")
    places = {"held": tmp_path / "held", "local": tmp_path / "local.py"}
    monkeypatch.setattr("region_pretrain.jobs.submission._submit", lambda *_: pytest.fail("ran"))
    with pytest.raises(UserError, match=message):
        submit(*(text.format(**places) for text in arguments))


def test_two_jobs_do_not_share_a_folder(tmp_path, monkeypatch):
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/17_submitted.pkl").write_text("")
    (tmp_path / "bin").mkdir()
    outputs = dict.fromkeys(("sbatch", "srun", "scontrol", "scancel"), "")
    outputs |= {"sinfo": "gpu", "squeue": "17_0 RUNNING"}
    for name, output in outputs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {output}\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    with pytest.raises(UserError, match="job 17 for .*/run is still in the queue"):
        submit("--slurm", "partition=gpu", f"train.output_dir={tmp_path}/run")
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\necho no controller >&2; exit 1\n")
    with pytest.raises(UserError, match="squeue failed: no controller"):
        submit("--slurm", "partition=gpu", f"train.output_dir={tmp_path}/run")


def test_a_job_finds_its_data_in_any_folder_and_process(tmp_path, coco_folder, monkeypatch):
    register, name = tmp_path / "register.py", f"registered_in_{tmp_path.name}"
    register.write_text(
        "from detectron2.data import DatasetCatalog\n"
        f"DatasetCatalog.register({name!r}, lambda: [])\n"
    )
    written = {}
    monkeypatch.setattr(
        "region_pretrain.jobs.submission._submit", lambda *args: written.update(args[-1])
    )
    config = Path(CONFIG).resolve()
    monkeypatch.chdir(coco_folder)
    args = parse(
        "--slurm",
        "partition=gpu",
        f"train.output_dir={tmp_path}/run",
        "train.register=[../register.py]",
        "dataloader.train.dataset.names=coco://ann.json?images=images",
        f"dataloader.test.dataset.names={name}",
    )
    args.config_file = str(config)
    submit_training(args, "tools/train_net.py")
    DatasetCatalog.remove(name)
    (text,) = written.values()
    saved = yaml.unsafe_load(text)
    assert saved["train"]["register"] == [str(register)]
    path = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"
    assert saved["dataloader"]["train"]["dataset"]["names"] == path
    assert saved["model"]["roi_heads"]["num_classes"] is None  # the job follows the data
