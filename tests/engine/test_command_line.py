import json
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate
from forked import run_tool as run
from tiny_run import make_config, make_detection_config

from region_pretrain.commands import evaluate, make_regions, pretrain_net, train_net, visualize
from region_pretrain.config import CONFIG_ROOT
from region_pretrain.engine.command_line import argument_parser, config_of
from region_pretrain.errors import UserError, exit_on_user_error


@pytest.fixture
def config(tmp_path):
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(make_config(tmp_path / "run"), path)
    return path


def test_pretraining_with_overrides_then_refusal_then_resume(config, tmp_path):
    done = run("pretrain_net.py", "--config-file", config, "train.max_iter=3", "model.noise=0.5")
    assert done.returncode == 0, done.stderr
    saved = LazyConfig.load(str(tmp_path / "run" / "config.yaml"))
    assert (saved.train.max_iter, saved.model.noise) == (3, 0.5)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]

    again = run("pretrain_net.py", "--config-file", config, "--resume", "train.max_iter=4")
    assert again.returncode == 2
    assert [line for line in again.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: cannot resume with a config that differs from {tmp_path}/run/config.yaml: "
        "model.noise: 0.5 -> 0.1; train.max_iter: 3 -> 4. "
        "Undo the change or choose another train.output_dir"
    ]
    assert "Traceback" not in again.stderr


def test_a_resume_with_the_config_of_a_run_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    LazyConfig.save(make_config("run"), "run/config.yaml")
    (tmp_path / "run/metrics.json").write_text("{}\n")
    parser = argument_parser("")

    def load(*more):
        return config_of(parser.parse_args(["--config-file", *more]))

    assert load("run/config.yaml", "--resume").train.output_dir == "run"
    monkeypatch.chdir(tmp_path / "run")
    assert load("config.yaml").train.output_dir == "run"  # a new run of this config
    message = rf"config.yaml is that of the run in {tmp_path}/run, but train.output_dir=run is .*: "
    with pytest.raises(UserError, match=f"{message}change .*, or add train.output_dir={tmp_path}/"):
        load("config.yaml", "--resume")
    assert load("config.yaml", "--resume", f"train.output_dir={tmp_path}/run")
    assert load("config.yaml", "--resume", "train.output_dir=another").train.output_dir == "another"


def test_a_mistyped_key_costs_one_line_and_nothing_else(config, tmp_path):
    done = run("pretrain_net.py", "--config-file", config, "train.max_itr=3")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "error: no key 'train.max_itr' in the config; did you mean train.max_iter"
    )
    assert last.endswith("to add it: +train.max_itr=...")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_fine_tuning_on_two_processes(tmp_path):
    path = str(tmp_path / "config.yaml")
    cfg = make_detection_config(tmp_path / "run", max_iter=2)
    cfg.train.precise_bn.enabled = False
    LazyConfig.save(cfg, path)
    done = run("train_net.py", "--config-file", path, "--num-gpus", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "log.txt.rank1").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["bbox"].keys() == {"AP", "AP-none"}


def test_evaluation_needs_weights_and_pretraining_has_none(config):
    done = run("pretrain_net.py", "--config-file", config, "--eval-only")
    assert done.returncode == 2 and "region-pretrain finetune" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("tool", ["pretrain_net.py", "train_net.py"])
def test_help_speaks_of_lazy_configs(tool):
    done = run(tool, "--help")
    assert done.returncode == 0
    assert f"{tool} --config-file" in done.stdout and "+key=value" in done.stdout
    assert "MODEL.WEIGHTS" not in done.stdout and "%(prog)s" not in done.stdout


def test_flags_may_follow_the_overrides(config, tmp_path):
    done = run("pretrain_net.py", "--config-file", config, "train.max_iter=2", "--resume")
    assert done.returncode == 0, done.stderr
    assert "no checkpoint" in done.stdout  # and says so


SHAPES = Path(__file__).parents[2] / "configs/detection/mask_rcnn_r18_fpn_shapes.py"


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("train_net.py", ["dataloader.train.dataset.names=folder://x"], "a folder has no boxes"),
        ("train_net.py", ["dataloader.test.dataset.names=nosuch"], "no data set is called"),
        ("pretrain_net.py", [], "the config is for region-pretrain finetune"),
        ("train_net.py", ["optimizer.lr=abc"], "optimizer.lr=abc: must be a number"),
        ("train_net.py", ["train.epochs=abc"], "train.epochs=abc: must be a number"),
        ("train_net.py", ["model.pixel_mean=1,2,3"], "write a list as model.pixel_mean=[a,b]"),
        ("train_net.py", ["--num-gpus", "0"], "--num-gpus 0"),
        ("make_regions.py", [], "is not a pre-training config"),
        ("visualize.py", [], "not a pre-training config"),
    ],
)
def test_a_mistake_costs_one_line(tool, arguments, message):
    done = run(tool, "--config-file", SHAPES, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr


def test_an_unfinished_method_costs_one_line(config):
    done = run("pretrain_net.py", "--config-file", config, "model._target_=tiny_run.Unfinished")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: model: Can't instantiate abstract class Unfinished")
    assert "forward" in last
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_costs_one_line(tmp_path):
    cfg = make_config(tmp_path / "run")
    cfg.optimizer.lr = 1e38
    cfg.train.log_period = 1
    path = str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, path)
    done = run("pretrain_net.py", "--config-file", path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: loss became NaN or infinite")
    assert "Traceback" not in done.stderr + done.stdout


def test_a_class_that_cannot_be_imported_is_one_line(capsys):
    """A misspelt ``_target_`` in an override."""

    @exit_on_user_error
    def main() -> None:
        instantiate({"_target_": "region_pretrain.data.shape.shapes", "split": "train"})

    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: a _target_ of the config: ImportError: Error loading")
    assert "region_pretrain.data.shape" in lines[0]

    @exit_on_user_error
    def other() -> None:
        raise ImportError("No module named 'panopticapi'")

    with pytest.raises(ImportError, match="panopticapi"):
        other()


ALL = "model, dataloader.train, optimizer, lr_multiplier"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (train_net, f"has no dataloader.train, optimizer, lr_multiplier: a config needs {ALL}"),
        (pretrain_net, f"has no dataloader.train, optimizer, lr_multiplier: a config needs {ALL}"),
        (evaluate, "has no dataloader: a config needs model, dataloader"),
        (visualize, "has no dataloader.train: a config needs model, dataloader.train"),
        (make_regions, "is not a pre-training config: it has no regions"),
    ],
)
def test_a_config_without_its_parts_is_refused_in_one_line(command, message, capsys):
    config = str(CONFIG_ROOT / "common/models/mask_rcnn_fpn.py")
    with pytest.raises(SystemExit):
        command.main(["--config-file", config])
    message += "" if "regions" in message else ", as LazyCalls or dicts of them"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {config} {message}"


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_reader_that_stops_reading_costs_no_line(options, lines):
    code = (
        "import time\n"
        "from region_pretrain.errors import exit_on_user_error\n"
        "def main():\n"
        "    time.sleep(0.2)\n"
        f"    for _ in range({lines}): print('a line')\n"
        "exit_on_user_error(main)()\n"
    )
    tool = subprocess.Popen(
        [sys.executable, *options, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    tool.stdout.close()
    assert (tool.stderr.read(), tool.wait(30)) == (b"", 141)


def test_a_broken_pipe_of_something_else_is_not_hidden(capsys):
    def main():
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        exit_on_user_error(main)()
