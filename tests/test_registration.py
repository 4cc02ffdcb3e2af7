"""Code that registers data sets: found when a config is loaded, executed once per process."""

import subprocess
import sys

import pytest
from detectron2.data import DatasetCatalog

from region_pretrain.config import CONFIG_ROOT, load_config, to_yaml
from region_pretrain.errors import UserError
from region_pretrain.registration import execute

REGISTER = """
from detectron2.data import DatasetCatalog
DatasetCatalog.register("{name}", lambda: [dict(file_name="{name}", image_id=0)])
with open("{log}", "a") as file:
    file.write("{name} ")
"""


@pytest.fixture
def write(tmp_path, request):
    """Write a file that registers a data set; the names are free again after the test."""
    used = []

    def write_file(file, text="", registers="", log=""):
        name = f"{request.node.name}_{registers}"
        path = tmp_path / file
        code = REGISTER.format(name=name, log=log or tmp_path / "log") if registers else ""
        path.write_text(code + text.replace("NAME", name))
        used.append(name)
        return str(path), name

    yield write_file
    for name in used:
        DatasetCatalog.data.pop(name, None)


def test_a_config_that_registers_is_kept_and_executed_in_other_processes(write, tmp_path):
    path, name = write("mine.py", "dataloader = dict(names='NAME')\n", registers="a")
    cfg = load_config(path, ["train.max_iter=3"])
    assert list(cfg.train.register) == [path]
    execute(cfg.train.register)  # it was executed when it was loaded
    assert (tmp_path / "log").read_text() == f"{name} "
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    code = (
        "from region_pretrain.config import load_config\n"
        "from region_pretrain.data.catalog import get_records\n"
        "for _ in range(2):\n"
        f"    cfg = load_config({str(tmp_path / 'config.yaml')!r})\n"
        "print(get_records(cfg.dataloader.names), list(cfg.train.register))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    records = [{"file_name": name, "image_id": 0}]
    assert done.stdout.splitlines()[-1] == f"{records} {[path]}", done.stderr
    assert (tmp_path / "log").read_text() == f"{name} " * 2  # once per process


def test_a_module_of_the_config_registers(write, tmp_path):
    path, name = write("names.py", "x = dict(a=1)\n", registers="a")
    main, _ = write("main.py", "from .names import x\ndata = dict(names='NAME')\n")
    assert list(load_config(main).train.register) == [main]
    # Loaded again, and by another config: neither clashes, and both know the data set.
    other, _ = write("other.py", "from .names import x\n")
    for config in (main, other, path):
        assert list(load_config(config).train.register) == [config]
    user, _ = write("user.py", f"data = dict(names='{name}')\n")
    assert list(load_config(user).train.register) == [path]  # the last that registered it


def test_code_given_by_hand(write, tmp_path, monkeypatch):
    path, name = write("by_hand.py", registers="a")
    config, _ = write("config.py", "train = dict()\n")
    monkeypatch.chdir(tmp_path)
    cfg = load_config("config.py", ["train.register=[by_hand.py]"])
    assert list(cfg.train.register) == [path] and name in DatasetCatalog
    assert list(load_config("config.py").train.register) == []

    _, module = write("mine_as_module.py", registers="b")
    monkeypatch.syspath_prepend(str(tmp_path))
    execute(["mine_as_module", "mine_as_module"])
    assert module in DatasetCatalog


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("absent.py", "absent.py failed: FileNotFoundError"),
        ("no.such_module", "No module named 'no'; is its folder on PYTHONPATH"),
        ("a/b", "'a/b' is neither a .py file nor the name of a module"),
        ("broken.py", "broken.py failed: ZeroDivisionError: division by zero"),
    ],
)
def test_code_that_fails_is_named(write, tmp_path, monkeypatch, entry, message):
    write("broken.py", "1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"train.register: .*{message}"):
        execute([entry])


def test_shipped_configs_register_nothing():
    code = (
        "import sys; from region_pretrain.config import load_config\n"
        "print([list(load_config(path).train.register) for path in sys.argv[1:]])"
    )
    projects = CONFIG_ROOT.parent / "projects"
    paths = [CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"]
    paths += sorted(projects.glob("*/configs/*shapes.py"))[:2]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == str([[], [], []]), done.stderr
