"""Every kind of file fills the right tensors of every method's model."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from sources import SOURCES, detectron2_names, fpn_and_head, resnet, write

from region_pretrain.config import CONFIG_ROOT, load_config
from region_pretrain.convert.names import common_name
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.modeling.meta_arch import renew_momentum_copies
from region_pretrain.modeling.momentum import MomentumCopy

PROJECTS = CONFIG_ROOT.parent / "projects"
METHODS = {
    "SoCo": "SoCo/configs/soco_r18-fpn_b32_shapes.py",
    "CCOP": "CCOP/configs/ccop_r18-fpn_b32_shapes.py",
    "MCL": "MCL/configs/mcl_r18-fpn_b32_shapes.py",
    "point-level": "PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py",
    "MoCo v2": "MoCo/configs/moco-v2_r18_b32_shapes.py",
    "BYOL": "BYOL/configs/byol_r18_b32_shapes.py",
}
PAGE = CONFIG_ROOT.parent / "docs" / "starting_weights.md"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folders = {title: tmp_path_factory.mktemp("source") for title in SOURCES}
    return {title: write(title, folder) for title, folder in folders.items()}


def documented() -> dict[str, dict[str, str]]:
    """The page's table: source -> method -> cell."""
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    head = next(i for i, row in enumerate(rows) if row[1:] == [*METHODS])
    table = itertools.takewhile(lambda row: len(row) == len(METHODS) + 1, rows[head + 2 :])
    return {
        title: dict(zip(METHODS, cells, strict=True))
        for titles, *cells in table
        for title in titles.split("; ")
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_documented_numbers_of_tensors_are_loaded(method, files):
    model = instantiate(load_config(str(PROJECTS / METHODS[method])).model)
    trunk, parts_of_detector, cells = detectron2_names(resnet()), fpn_and_head(), {}
    for title, path in files.items():
        for parameter in model.parameters():
            parameter.data.fill_(-1)
        report = load_pretrained(model, path)
        renew_momentum_copies(model)
        filled = {name: model.state_dict()[name] for name in report.matched}
        of_trunk = {k: v for k, v in filled.items() if common_name(k) in trunk}
        assert len(of_trunk) == 120  # 20 convolutions with a norm of 5 tensors
        assert all(torch.equal(v, trunk[common_name(k)]) for k, v in of_trunk.items())
        for name in filled.keys() - of_trunk.keys():
            assert torch.equal(filled[name], parts_of_detector[name]), name
        for copy in (m for m in model.modules() if isinstance(m, MomentumCopy)):
            for name, parameter in copy.named_parameters():
                if common_name(name).startswith(("stem.", "res")):
                    assert torch.equal(parameter, trunk[common_name(name)]), name
        parts = ["trunk"]
        if any(common_name(k).startswith("fpn_") for k in filled):
            parts.append("FPN")
        if any("box_head" in k for k in filled):
            parts.append("head")
        cells[" ".join(title.split()[:-1])] = f"{len(filled)} ({', '.join(parts)})"
    assert cells == {title: row[method] for title, row in documented().items()}


def test_no_other_method_lacks_a_column():
    packages = {p.parent.parent.name for p in PROJECTS.glob("*/configs/*_shapes.py")}
    assert packages == {re.split("/", path)[0] for path in METHODS.values()}
    assert Path(PAGE).is_file()
