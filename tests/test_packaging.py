"""What a wheel contains, and that it works without the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DETECTOR = "configs/detection/mask_rcnn_r18_fpn_shapes.py"
METHOD = "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(cwd)}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """``bin/`` of an environment with the wheel, which sees the packages of the running one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"]
    wheel = ["bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder / "dist"]
    run(sys.executable, "setup.py", "-q", *build, *wheel, cwd=ROOT)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    bin_ = folder / "venv/bin"
    (file,) = (folder / "dist").iterdir()
    pip = [sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "-q"]
    run(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", file, cwd=folder)
    packages = run(
        bin_ / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # A plain path: the .pth files in it, such as that of an editable install, are not executed.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(packages.strip(), "running.pth").write_text("\n".join(others) + "\n")
    return bin_


def test_contents(installed):
    package = next(installed.parent.glob("lib/python*/site-packages/region_pretrain"))
    for name in ("py.typed", "projects/soco/__init__.py", f"shipped/{DETECTOR}", "shipped/LICENSE"):
        assert (package / name).is_file(), name
    for folder, pattern in (
        ("configs", "**/*.py"),
        ("projects", "*/configs/**/*.py"),
        ("tools", "*.py"),
    ):
        there = {
            p.relative_to(package / "shipped") for p in (package / "shipped" / folder).glob(pattern)
        }
        assert there == {p.relative_to(ROOT) for p in (ROOT / folder).glob(pattern)}


def test_configs_are_found_by_name_and_own_files_win(installed, tmp_path):
    own = tmp_path / METHOD
    own.parent.mkdir(parents=True)
    code = f"""
import region_pretrain
assert region_pretrain.__file__.startswith({str(installed.parent)!r}), region_pretrain.__file__
from region_pretrain.config import get_config, load_config
from region_pretrain.engine.methods import load_method
from region_pretrain.sweeps.definition import load_sweep
assert get_config({METHOD!r}).dataloader.train.total_batch_size == 32
assert get_config("detection/mask_rcnn_r18_fpn_shapes.py").model == get_config({DETECTOR!r}).model
assert load_config({METHOD!r}).train.amp.enabled is False
open({str(own)!r}, "w").write("train = dict(max_iter=7)")
assert load_config({METHOD!r}).train.max_iter == 7
assert "predictor" in load_method("soco", {DETECTOR!r}).model
assert load_sweep("configs/sweeps/demo.py").output_dir == "output/demo"
"""
    run(installed / "python", "-c", code, cwd=tmp_path)


def test_from_regions_to_an_evaluation_without_the_checkout(installed, tmp_path):
    command, ten = installed / "region-pretrain", "dataset.names.size=10"
    store, common = "dataloader.train.dataset.regions=r.arrow", ["train.device=cpu"]
    common += [f"dataloader.train.{ten}", "dataloader.train.num_workers=0", "train.max_iter=2"]
    run(command, "regions", "--config-file", METHOD, "--workers", 1, common[1], store,
        cwd=tmp_path)  # fmt: skip
    run(command, "pretrain", "--config-file", METHOD, *common, store, "train.output_dir=pre",
        "dataloader.train.total_batch_size=4", cwd=tmp_path)  # fmt: skip
    run(command, "finetune", "--config-file", DETECTOR, *common, f"dataloader.test.{ten}",
        "dataloader.train.total_batch_size=2", "train.init_checkpoint=pre/model_final.pth",
        "train.output_dir=det", cwd=tmp_path)  # fmt: skip
    run(installed / "python", "-m", "region_pretrain", "evaluate", "--config-file",
        "det/config.yaml", "train.init_checkpoint=det/model_final.pth", cwd=tmp_path)  # fmt: skip
    results, again = (tmp_path / f"det/results{name}.json" for name in ("", "_eval"))
    assert results.read_text() == again.read_text() and "bbox" in results.read_text()


def test_a_sweep_without_the_checkout(installed, tmp_path):
    (tmp_path / "s.py").write_text(
        f"sweep = dict(pretrain=dict(soco=dict(config={METHOD!r}, overrides=["
        "'dataloader.train.dataset.names.size=4', 'dataloader.train.total_batch_size=2',"
        "'dataloader.train.dataset.regions=null', 'train.device=cpu', 'train.max_iter=2',"
        "'dataloader.train.num_workers=0'])), output_dir='out')"
    )
    sweep = [installed / "region-pretrain", "sweep", "--config", "s.py", "--cluster", "debug"]
    printed = run(*sweep, cwd=tmp_path)
    (final,) = tmp_path.glob("out/runs/soco_seed0-*/model_final.pth")
    assert "region-pretrain sweep status" in printed
    (code,) = filter(Path.is_dir, tmp_path.glob("out/code/*"))
    assert sorted(p.name for p in code.iterdir()) == [
        "configs",
        "projects",
        "region_pretrain",
        "tools",
    ]
