"""Steps run once, go on after a stop, and say what went wrong."""

import json

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs.snapshot import in_checkout
from region_pretrain.sweeps.steps import Steps

TOOL = """
import sys, pathlib
args = sys.argv[1:]
out = pathlib.Path(args[-1])
with open(out.with_suffix(".calls"), "a") as f:
    f.write(" ".join(args) + chr(10))
print("iter 3/4  total_loss 1.5  eta 0:00:01")
if "fail" in args:
    print("error: no data set is called x", file=sys.stderr)
    sys.exit(2)
if "crash" in args:
    raise RuntimeError("the disk melted")
if "nothing" not in args:
    out.write_text("done")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "t.py").write_text(TOOL)
    monkeypatch.setattr("region_pretrain.jobs.snapshot.CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(folder):
    path = folder / "product.calls"
    return path.read_text().splitlines() if path.exists() else []


def run(folder, said, *args, run_folder=None):
    steps = Steps(str(folder / "out"), said.append, every=0)
    steps.run("step a", "tools/t.py", [*args, "product"], "product", run_folder)
    return steps


def test_says_the_command_and_progress_and_keeps_the_whole_log(folder):
    said = []
    steps = run(folder, said, "x=1 2")
    assert "$ python tools/t.py 'x=1 2' product" in said[0]
    assert said[1] == "  iter 3/4  total_loss 1.5  eta 0:00:01"
    assert (folder / "out/logs/step_a.txt").read_text() == said[1].strip() + "\n"
    assert steps.command("step a") == "python tools/t.py 'x=1 2' product"
    recorded = json.loads((folder / "out/steps.json").read_text())["step a"]
    assert recorded["finished"] and steps.minutes("step a") == recorded["seconds"] / 60 > 0


def test_finished_steps_are_skipped_until_command_or_product_change(folder):
    said = []
    run(folder, said, "x=1")
    assert len(calls(folder)) == 1
    run(folder, said, "x=1")
    assert len(calls(folder)) == 1 and "finished before" in said[-1]
    run(folder, said, "x=2")
    assert len(calls(folder)) == 2
    (folder / "product").unlink()
    run(folder, said, "x=2")
    assert calls(folder) == ["x=1 product", "x=2 product", "x=2 product"]


def test_a_stopped_training_is_resumed_and_its_minutes_add_up(folder):
    with pytest.raises(UserError):
        run(folder, [], "crash")
    first = json.loads((folder / "out/steps.json").read_text())["step a"]
    assert not first["finished"]
    run_folder = folder / "run"
    run_folder.mkdir()
    (run_folder / "config.yaml").write_text("{}")
    (run_folder / "metrics.json").write_text("")
    with pytest.raises(UserError):
        run(folder, [], "crash", run_folder=str(run_folder))
    assert calls(folder) == ["crash product", "--resume crash product"]
    second = json.loads((folder / "out/steps.json").read_text())["step a"]
    assert second["seconds"] > first["seconds"]
    assert second["command"] == ["tools/t.py", "crash", "product"]


def test_a_failure_names_step_log_and_last_lines(folder):
    with pytest.raises(
        UserError, match=r"step a failed \(exit code 2, log .*step_a.txt\): error: "
    ):
        run(folder, [], "fail")
    with pytest.raises(UserError, match="exit code 1.*\n.*(\n.*)*the disk melted"):
        run(folder, [], "crash")
    with pytest.raises(UserError, match="ended without product"):
        run(folder, [], "nothing")


def test_a_tool_that_is_not_there(folder):
    with pytest.raises(UserError, match="no .*tools/absent.py: run this from a checkout"):
        in_checkout("tools/absent.py")
