"""Build and packaging: the library, and the methods under ``projects/`` as its sub-packages."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
VERSION = re.search(
    r'^__version__ = "(.+)"', (ROOT / "region_pretrain" / "__init__.py").read_text(), re.MULTILINE
).group(1)


def find_projects() -> dict[str, str]:
    """``projects/NAME/name`` (a folder with ``__init__.py``) -> ``region_pretrain.projects.name``.

    Returns:
        Every project's packages, its sub-packages too: dotted name -> folder relative to here.
    """
    found = {}
    for project in sorted(p for p in (ROOT / "projects").glob("*") if p.is_dir()):
        for package in find_packages(str(project)):
            folder = (project / package.replace(".", "/")).relative_to(ROOT).as_posix()
            name = f"region_pretrain.projects.{package}"
            if name in found:
                raise SystemExit(
                    f"error: two projects hold a package {package}: {found[name]}, {folder}"
                )
            found[name] = folder
    return found


PROJECTS = find_projects()


class BuildWithShipped(build_py):
    """``build_py`` that also copies configs and tools; a development install reads the checkout's.

    ``region_pretrain.shipped`` finds them.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "region_pretrain/shipped")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "LICENSE", target)  # tools/install_detectron2.py puts it in its wheel
        for name in ("configs", "projects", "tools"):
            shutil.rmtree(target / name, ignore_errors=True)  # of an earlier build
        for source in (ROOT / "configs", ROOT / "tools", *ROOT.glob("projects/*/configs")):
            shutil.copytree(
                source,
                target / source.relative_to(ROOT),
                ignore=shutil.ignore_patterns("__pycache__", ".*"),
            )


setup(
    name="region_pretrain",
    version=VERSION,
    description="Region-level self-supervised pre-training of Detectron2 detectors",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["region_pretrain", "region_pretrain.*"]) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={"region_pretrain": ["py.typed"]},
    python_requires=">=3.10",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",  # the version that all tests run on
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    entry_points={"console_scripts": ["region-pretrain = region_pretrain.commands.cli:main"]},
    # Detectron2 itself is on no index under its own name: tools/install_detectron2.py brings it.
    # What it imports is listed here with our own needs, so that one `pip install` serves both.
    install_requires=[
        "cloudpickle",
        "fonttools",  # parses the SVG paths of emoji
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7",
        "jinja2",
        "matplotlib",
        "numpy",
        "omegaconf>=2.1",
        "opencv-contrib-python>=4.11",  # IMREAD_COLOR_RGB
        "packaging",
        "pillow>=11.3",  # reads AVIF
        "pyarrow",
        "psutil; sys_platform != 'linux'",  # Linux has /proc
        "pycocotools>=2.0.2",
        "safetensors",
        "scikit-image",
        "scipy>1.5.1",
        "setuptools<81",  # detectron2.model_zoo imports pkg_resources, which 81 removed
        "shapely",
        "shtab",  # shell completion
        "simplejpeg",
        "submitit",
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "torch",
        "torchvision",
        "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
    extras_require={
        "dev": [
            "black",
            "hypothesis",
            "ipykernel",
            "mlflow-skinny",
            "nbclient",
            "pytest",
            "pytest-xdist",
            "ruff",
            "timm",
            "wandb",
        ],
        "timm": ["timm"],  # backbones of timm, and the transformers of Detectron2
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],  # the client; a database as store needs mlflow itself
        "docs": ["mkdocs", "mkdocs-material", "mkdocstrings[python]"],
    },
    cmdclass={"build_py": BuildWithShipped},
)
