"""The code of a sweep's jobs: copied, and compared with that of the finished runs."""

import os
import shutil
from pathlib import Path

import pytest
from detectron2 import model_zoo
from sweep_plans import DETECTOR, sweep

from region_pretrain.config import load_config, to_yaml
from region_pretrain.errors import UserError
from region_pretrain.jobs import snapshot
from region_pretrain.sweeps import state, submission
from region_pretrain.sweeps.code import own_packages
from region_pretrain.sweeps.configs import load
from region_pretrain.sweeps.graph import CONFIG, FINETUNE, Plan, Run
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.report import write_sweep_report


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder of packages of the user's own, on the path."""
    folder = tmp_path / "mine"
    for name in ("my_method/__init__.py", "my_method/__pycache__/a.pyc", "my_method/.git/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "my_method/heads").mkdir()
    (folder / "my_method/heads/mlp.py").write_text("")
    (folder / "my_views.py").write_text("")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def copied(root):
    files = {path.relative_to(root).as_posix() for path in Path(root).rglob("*") if path.is_file()}
    return {name for name in files if name.startswith("my_")}


def test_a_package_of_the_users_own_is_copied(tmp_path, mine, monkeypatch):
    names = ["my_method", "my_views", "torch", "detectron2", "math", "sys", "absent"]
    without = snapshot.take_snapshot(str(tmp_path))
    found = snapshot.take_snapshot(str(tmp_path), names)
    assert copied(without) == set() and without != found
    assert copied(found) == {"my_method/__init__.py", "my_method/heads/mlp.py", "my_views.py"}
    assert snapshot.take_snapshot(str(tmp_path), reversed(names)) == found
    (mine / "my_method/heads/mlp.py").write_text("a = 1")
    assert snapshot.take_snapshot(str(tmp_path), names) != found
    assert not (Path(found) / "torch").exists() and not (Path(found) / "detectron2").exists()


def test_links_are_followed_and_required_libraries_are_not_copied(tmp_path, mine):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/classes.txt").write_text("cat")
    os.symlink(tmp_path / "data", mine / "my_method/data")
    os.symlink(mine / "my_method", mine / "my_method/loop")
    os.symlink(tmp_path / "absent", mine / "my_method/nothing.txt")
    (mine / "detectron2").mkdir()  # a checkout of it on the path
    (mine / "detectron2/__init__.py").touch()
    found = snapshot.take_snapshot(str(tmp_path), ["my_method", "detectron2", "__main__", "os"])
    assert copied(found) == {
        "my_method/__init__.py", "my_method/heads/mlp.py", "my_method/data/classes.txt"
    }  # fmt: skip
    assert not {"detectron2", "os", "frozen"} & set(os.listdir(found))


def test_pages_and_definitions_of_sweeps_are_no_code(tmp_path):
    found = Path(snapshot.take_snapshot(str(tmp_path)))
    assert (found / "configs/common/train.py").is_file()
    assert not (found / "configs/sweeps").exists() and not list(found.rglob("*.md"))


def test_a_large_package_is_not_copied(tmp_path, mine, monkeypatch, caplog):
    monkeypatch.setattr(snapshot, "_LARGEST", 10)
    found = snapshot.take_snapshot(str(tmp_path), ["my_method", "my_views"])
    assert copied(found) == {"my_views.py"}
    assert caplog.messages == [f"{mine}/my_method is not copied, as it has more than 20 MB"]


@pytest.mark.parametrize(
    ("text", "packages"),
    [
        ("model:\n  _target_: my_method.meta_arch.Model\n  a: {_target_: b.C}", {"my_method", "b"}),
        ("x={_target_:my_data.scenes,size:3}", {"my_data"}),
        ("x.y._target_=my_data.scenes", {"my_data"}),
        ('"_target_": "my_data.scenes"', {"my_data"}),
        ("f: !!python/name:my_layers.norm ''", {"my_layers"}),
        ("my_target_: a.b", set()),
    ],
)
def test_packages_of_a_text(text, packages):
    assert snapshot.packages_of(text) == packages


def test_packages_of_a_plan(tmp_path):
    config = tmp_path / "mine.yaml"
    changes = {"finetune": {"det": {"config": str(config)}}, "baselines": {"random": {}}}
    config.write_text(to_yaml(load_config(DETECTOR)))
    extra = "+dataloader.mine={_target_:my_data.scenes}"
    plan = make_plan(sweep(tmp_path, finetune_overrides=[extra], **changes))
    assert {"my_data", "detectron2", "region_pretrain"} <= own_packages(plan)


def test_packages_of_a_yacs_config_that_needs_its_overrides(tmp_path):
    config = tmp_path / "mine.yaml"
    base = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    names = "  TRAIN: ('shapes_train',)\n  TEST: ('shapes_val', 'shapes_train')\n"
    config.write_text(f"_BASE_: {base}\nDATASETS:\n{names}")
    with pytest.raises(UserError, match="exactly one test set"):
        load(str(config), [])
    task = (CONFIG, str(config), "DATASETS.TEST=('shapes_val',)")
    plan = Plan({"a": Run("a", FINETUNE, "a", "t.py", (task,), "a", "a/b")})
    assert "detectron2" in own_packages(plan)


def test_finished_runs_of_other_code_are_named(sweeps, monkeypatch, tmp_path):
    sweeps.add("a")
    sweeps.start()
    assert sweeps.wait() == {"a": state.FINISHED}
    later = tmp_path / "later"
    shutil.copytree(sweeps.code, later)
    said = []

    def start():
        said.clear()
        submission.start(sweeps.file(), str(sweeps.folder), said.append)
        sweeps.wait()
        return [line for line in said if "code" in line]

    assert not start()  # the same code
    for name in ("fake.py", "new.py"):
        with open(later / "tools" / name, "a") as file:
            file.write("\n")
    monkeypatch.setattr(submission, "take_snapshot", lambda folder, packages: str(later))
    sweeps.add("b", "a")
    assert start() == [
        "finished with other code and not computed again: 1 runs; changed since: tools/fake.py, "
        f"tools/new.py (diff -r {sweeps.code} {later}); to compute them again, delete in "
        f"{sweeps.folder}/runs: a"
    ]
    codes = {run.id: state.read_record(run).code for run in sweeps.plan.runs.values()}
    assert codes == {"a": "code", "b": "later"}
    assert [name for name, *_ in sweeps.noted()].count("start") == 2  # a was not repeated
    text = Path(write_sweep_report(str(sweeps.folder))[1]).read_text()
    assert f"computed with different code: 1 with code, 1 with later of {tmp_path}." in text
    shutil.rmtree(sweeps.code)
    (line,) = start()
    assert "1 runs; changed since: its copy is gone (diff" in line
