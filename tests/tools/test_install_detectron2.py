"""Checks the converted Detectron2 against upstream's digest, and the wheel with pip itself."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import detectron2
import pytest
from forked import LONG
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "install_detectron2.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_carrier(path: Path, files: dict[str, bytes]) -> Path:
    """A wheel structured like the real one: the prefix rewritten, and unrelated files."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            if name.endswith(".py"):
                content = content.replace(b"detectron2.", b"EZannot.detectron2.")
            wheel.writestr(f"EZannot/detectron2/{name}", content)
        wheel.writestr("EZannot/gui.py", b"import wx\n")
        wheel.writestr("ezannot-1.1.0.dist-info/METADATA", b"Name: EZannot\n")
    return path


@pytest.fixture(scope="module")
def toy_files() -> dict[str, bytes]:
    return {
        "__init__.py": b'__version__ = "0.6"\nfrom detectron2.layers import ops\n',
        "layers/__init__.py": b"",
        "layers/ops.py": b"import detectron2.layers\nVALUE = 3\n",
        "projects/deeplab/__init__.py": b"from detectron2.layers.ops import VALUE\n",
        "model_zoo/configs/Base.yaml": b"MODEL: {WEIGHTS: detectron2.pkl}\n",
    }


@pytest.fixture
def toy(tmp_path, toy_files, monkeypatch):
    """The tool and a small carrier whose digests it accepts."""
    tool = load_tool()
    carrier = make_carrier(tmp_path / "ezannot-1.1.0-py3-none-any.whl", toy_files)
    sha256 = hashlib.sha256(carrier.read_bytes()).hexdigest()
    monkeypatch.setattr(tool, "CARRIER_SHA256", sha256)
    monkeypatch.setattr(tool, "TREE_SHA256", tool.tree_sha256(toy_files))
    return tool, carrier


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, toy_files) -> Path:
    """The wheel made from the real carrier; offline, from the installed files."""
    tool = load_tool()
    folder = tmp_path_factory.mktemp("carrier")
    download = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        + ["--retries", "0", "-d", str(folder), tool.CARRIER],
        capture_output=True,
        timeout=LONG,
    )
    if download.returncode == 0:
        files = tool.extract_detectron2(next(folder.glob("*.whl")))
    else:
        home = Path(detectron2.__file__).parent
        paths = [p for p in home.rglob("*") if p.suffix in (".py", ".yaml") and p.is_file()]
        files = {p.relative_to(home).as_posix(): p.read_bytes() for p in paths}
    return tool.write_wheel(files, tmp_path_factory.mktemp("wheel"))


def run_python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.path.expanduser("~"),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_detectron2_is_the_upstream_commit():
    """The Detectron2 that all other tests use has the digest computed from upstream's git."""
    tool = load_tool()
    home = Path(detectron2.__file__).parent
    files = {p.relative_to(home).as_posix(): p.read_bytes() for p in home.rglob("*.py")}
    own = [p for p in files if not p.startswith(tool.NOT_IN_TREE)]
    assert len(own) == 154
    assert tool.tree_sha256(files) == tool.TREE_SHA256


def test_wheel_contains_the_upstream_commit_and_nothing_else(wheel):
    tool = load_tool()
    assert wheel.name == "detectron2-0.6+28fd05e-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    tops = {n.split("/")[0] for n in files}
    assert tops == {"detectron2", "detectron2-0.6+28fd05e.dist-info"}
    tree = {n[len("detectron2/") :]: c for n, c in files.items() if n.startswith("detectron2/")}
    assert tool.tree_sha256(tree) == tool.TREE_SHA256
    assert "model_zoo/configs/COCO-Detection/retinanet_R_50_FPN_1x.py" in tree
    assert "projects/point_rend/__init__.py" in tree
    assert not [n for n, c in files.items() if b"EZannot" in c]
    assert b"Apache License" in files["detectron2-0.6+28fd05e.dist-info/LICENSE"]


def test_record_lists_every_file_with_its_hash_and_size(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record_name = next(n for n in names if n.endswith("/RECORD"))
        rows = {r[0]: r[1:] for r in csv.reader(io.StringIO(archive.read(record_name).decode()))}
        assert rows.pop(record_name) == ["", ""]
        assert sorted(rows) == sorted(set(names) - {record_name})
        for name, (digest, size) in rows.items():
            content = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            assert digest == "sha256=" + expected.rstrip("=")
            assert int(size) == len(content)


def test_installed_in_a_target_folder_it_imports(wheel, tmp_path):
    target = tmp_path / "site"
    run_python("-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel))
    code = (
        "import detectron2, importlib.metadata as m; from detectron2 import model_zoo; "
        "print(detectron2.__file__); print(m.version('detectron2')); "
        "print(m.metadata('detectron2')['License']); "
        "print(model_zoo.get_config('COCO-Detection/retinanet_R_50_FPN_1x.py').train.max_iter)"
    )
    lines = run_python("-W", "ignore", "-c", code, PYTHONPATH=str(target)).splitlines()
    assert Path(lines[0]) == target / "detectron2" / "__init__.py"
    assert lines[1:] == ["0.6+28fd05e", "Apache-2.0", "90000"]


def test_pip_lists_shows_and_uninstalls_it(wheel, tmp_path):
    run_python("-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    done = subprocess.run([python, str(TOOL), "--from", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    inside = ("-m", "pip", "--python", python)
    assert "detectron2==0.6+28fd05e\n" in run_python(*inside, "freeze")
    shown = run_python(*inside, "show", "-f", "detectron2")
    assert "Version: 0.6+28fd05e" in shown and "detectron2/modeling/poolers.py" in shown
    run_python(*inside, "uninstall", "-q", "-y", "detectron2")
    assert not list((tmp_path / "venv").rglob("detectron2*"))


def test_requirements_are_met():
    """The dependencies in setup.py meet every requirement in METADATA."""
    stated = re.findall(r"^Requires-Dist: (.+)$", load_tool().METADATA, re.MULTILINE)
    requirements = [Requirement(line) for line in stated]
    needed = [r for r in requirements if r.marker is None]
    assert {"torch", "fvcore", "omegaconf", "pycocotools"} <= {r.name for r in needed}
    for requirement in needed:
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_prefix_is_restored_in_python_files_only(toy, toy_files):
    tool, carrier = toy
    assert tool.extract_detectron2(carrier) == toy_files


def test_same_files_give_the_same_wheel(toy, toy_files, tmp_path):
    tool, _ = toy
    first = tool.write_wheel(toy_files, tmp_path / "a").read_bytes()
    assert tool.write_wheel(toy_files, tmp_path / "b").read_bytes() == first


def test_tampered_download_stops_with_one_line(toy, tmp_path, monkeypatch, capsys):
    tool, carrier = toy
    content = bytearray(carrier.read_bytes())
    content[len(content) // 2] ^= 1
    carrier.write_bytes(content)
    monkeypatch.setattr(tool, "find_installed", lambda: None)
    monkeypatch.setattr(tool, "download_carrier", lambda folder: carrier)
    assert tool.main(["--wheel-dir", str(tmp_path / "wheels")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ezannot-1.1.0-py3-none-any.whl: sha256 is ")
    assert error.count("\n") == 1
    assert not list((tmp_path / "wheels").iterdir())


def test_different_tree_stops_with_one_line(toy, toy_files, tmp_path, monkeypatch, capsys):
    """The wheel's hash matches, but one byte of one Detectron2 file is different."""
    tool, carrier = toy
    changed = {**toy_files, "layers/ops.py": toy_files["layers/ops.py"].replace(b"3", b"4")}
    make_carrier(carrier, changed)
    sha256 = hashlib.sha256(carrier.read_bytes()).hexdigest()
    monkeypatch.setattr(tool, "CARRIER_SHA256", sha256)
    monkeypatch.setattr(tool, "find_installed", lambda: None)
    monkeypatch.setattr(tool, "download_carrier", lambda folder: carrier)
    assert tool.main(["--wheel-dir", str(tmp_path / "wheels")]) == 2
    error = capsys.readouterr().err
    assert "is not commit 28fd05e" in error and error.count("\n") == 1
    assert not list((tmp_path / "wheels").iterdir())


def test_working_detectron2_is_left_unchanged(monkeypatch, capsys):
    tool = load_tool()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail(f"ran {a}"))
    assert tool.main([]) == 0
    home = Path(detectron2.__file__).parent
    assert re.fullmatch(
        rf"Detectron2 0\.6\S* in {home} works: left unchanged\n", capsys.readouterr().out
    )


def test_folder_called_detectron2_is_not_an_installation(tmp_path):
    (tmp_path / "detectron2").mkdir()
    code = (
        f"import sys; sys.path[:0] = [{str(TOOL.parent)!r}, {str(tmp_path)!r}]; "
        "import detectron2, install_detectron2 as tool; print(tool.find_installed())"
    )
    # -S: without site-packages, so without the real one
    assert run_python("-I", "-S", "-c", code) == "None\n"


def test_broken_installation_is_reported(tmp_path, monkeypatch, capsys):
    tool = load_tool()

    def broken(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(tool.importlib, "import_module", broken)
    assert tool.main([]) == 2
    expected = "error: detectron2 is installed, but importing it fails: No module named 'torch'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("kind", ["missing", "folder", "not a zip", "another package"])
def test_bad_path_stops_with_one_line(kind, tmp_path, monkeypatch, capsys):
    tool = load_tool()
    path = tmp_path / "source.whl"
    if kind == "folder":
        path.mkdir()
    elif kind == "not a zip":
        path.write_bytes(b"hello")
    elif kind == "another package":
        make_carrier(path, {"__init__.py": b""})
    monkeypatch.setattr(tool, "find_installed", lambda: None)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail(f"ran {a}"))
    assert tool.main(["--from", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --from {path}: n") and error.count("\n") == 1


def test_local_wheel_and_checkout_reach_pip(toy, toy_files, tmp_path, monkeypatch):
    """``--from PATH``: a wheel is used unchanged, a checkout is built by its own setup.py."""
    tool, _ = toy
    given = tool.write_wheel(toy_files, tmp_path / "given")
    assert tool.obtain_wheel(str(given), tmp_path / "out") == given

    checkout = tmp_path / "checkout"
    (checkout / "detectron2").mkdir(parents=True)
    (checkout / "detectron2" / "__init__.py").write_text('__version__ = "0.6"\n')
    (checkout / "setup.py").write_text(
        "import torch\nfrom setuptools import setup\n"
        "setup(name='detectron2', version='0.6', packages=['detectron2'])\n"
    )
    built = tool.obtain_wheel(str(checkout), tmp_path / "out")
    assert built == tmp_path / "out" / "detectron2-0.6-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        assert archive.read("detectron2/__init__.py") == b'__version__ = "0.6"\n'
