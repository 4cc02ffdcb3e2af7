"""Box heads of a Cascade R-CNN: one for all stages, and one for each."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from narrow_detector import PRETRAINED, save, state

from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector

sys.path.insert(0, str(Path(__file__).parents[1] / "projects"))
from narrow_detectors import DETECTORS  # noqa: E402

CASCADE = "Cascade R-CNN, FPN"
DIFFER = "the box heads of its stages differ, and here there is one for all stages"


def test_one_box_head_fills_every_stage_of_a_cascade(tmp_path):
    """A Mask R-CNN's pre-training serves the Cascade R-CNN on the same backbone."""
    single = instantiate(DETECTORS["Faster/Mask R-CNN, FPN"]())
    cascade = instantiate(DETECTORS[CASCADE]())
    report = load_pretrained(cascade, save(tmp_path, {"model": state(single, *PRETRAINED)}))
    heads = cascade.roi_heads.box_head
    for stage in heads:
        for name, value in single.roi_heads.box_head.state_dict().items():
            assert torch.equal(stage.state_dict()[name], value), name
    assert report.modules["roi_heads.box_head"].loaded_tensors == 12  # 3 stages of 2 fc layers
    assert not report.unexpected


def test_convolutions_of_a_box_head_fill_every_stage_of_a_cascade(tmp_path):
    """MCL pre-trains them without the fully connected layers behind them."""
    single = instantiate(DETECTORS["Mask R-CNN, FPN, convolutions in the box head"]())
    cascade = instantiate(DETECTORS["Cascade R-CNN, FPN, convolutions in the box heads"]())
    trained = state(single, "backbone.", "roi_heads.box_head.conv")
    before = {name: tensor.clone() for name, tensor in cascade.state_dict().items()}
    report = load_pretrained(cascade, save(tmp_path, {"model": trained}))
    assert report.modules["roi_heads.box_head"].loaded_tensors == 12  # 3 stages of 2 convolutions
    for i, stage in enumerate(cascade.roi_heads.box_head):
        assert torch.equal(stage.conv2.weight, trained["roi_heads.box_head.conv2.weight"])
        assert torch.equal(stage.fc1.weight, before[f"roi_heads.box_head.{i}.fc1.weight"])
    del trained["roi_heads.box_head.conv2.bias"]
    with pytest.raises(UserError, match=r"fills 9 of the 12 tensors of roi_heads.box_head.conv"):
        load_pretrained(cascade, save(tmp_path, {"model": trained}))


def cascade(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return instantiate(DETECTORS[CASCADE]())


def shared(seed: int) -> torch.nn.Module:
    """What pre-training has of the detector: one head, under the names of all stages."""
    torch.manual_seed(seed)
    parts = Detector(DETECTORS[CASCADE]())
    model = torch.nn.Module()
    model.backbone = instantiate(DETECTORS[CASCADE]()).backbone
    model.roi_heads = torch.nn.Module()
    model.roi_heads.box_head = instantiate(parts.head.part)
    return model


def test_each_stage_keeps_its_own_head(tmp_path, caplog):
    source, target = cascade(1), cascade(2)
    load_pretrained(target, save(tmp_path, {"model": state(source, *PRETRAINED)}))
    for mine, theirs in zip(target.roi_heads.box_head, source.roi_heads.box_head, strict=True):
        assert torch.equal(mine.fc1.weight, theirs.fc1.weight)
    assert DIFFER not in caplog.text


@pytest.mark.parametrize("differ", [True, False])
def test_the_first_stage_fills_one_head_for_all_stages(tmp_path, caplog, differ):
    source, target = cascade(1), shared(2)
    heads = source.roi_heads.box_head
    assert not torch.equal(heads[0].fc1.weight, heads[2].fc1.weight)
    if not differ:
        for stage in heads[1:]:
            stage.load_state_dict(heads[0].state_dict())
    report = load_pretrained(target, save(tmp_path, {"model": state(source, *PRETRAINED)}))
    for stage in target.roi_heads.box_head:
        assert torch.equal(stage.fc1.weight, heads[0].fc1.weight)
    assert not report.unexpected
    assert (DIFFER in caplog.text) == differ


@pytest.mark.parametrize("differ", [True, False])
def test_the_first_stage_fills_the_head_of_a_faster_rcnn(tmp_path, caplog, differ):
    source = cascade(1)
    single = instantiate(DETECTORS["Faster/Mask R-CNN, FPN"]())
    heads = source.roi_heads.box_head
    if not differ:
        for stage in heads[1:]:
            stage.load_state_dict(heads[0].state_dict())
    report = load_pretrained(single, save(tmp_path, {"model": state(source, *PRETRAINED)}))
    for name, value in heads[0].state_dict().items():
        assert torch.equal(single.roi_heads.box_head.state_dict()[name], value)
    assert report.modules["roi_heads.box_head"].loaded_tensors == 4
    assert not report.unexpected
    assert (DIFFER in caplog.text) == differ


def test_a_layer_of_the_first_stage_that_the_head_lacks_is_refused(tmp_path):
    single = instantiate(DETECTORS["Faster/Mask R-CNN, FPN"]())
    weights = state(cascade(1), *PRETRAINED)
    for stage in range(3):
        weights[f"roi_heads.box_head.{stage}.fc3.weight"] = torch.ones(2, 2)
    with pytest.raises(UserError, match=r"has others there, such as roi_heads.box_head.0.fc3.weig"):
        load_pretrained(single, save(tmp_path, {"model": weights}))


def test_a_shared_tensor_may_be_in_the_file_under_its_second_name(tmp_path):
    target = shared(2)
    weights = state(target, *PRETRAINED)
    kept = {
        name: torch.full_like(tensor, 0.5)
        for name, tensor in weights.items()
        if not name.startswith(("roi_heads.box_head.0.", "roi_heads.box_head.1."))
    }
    report = load_pretrained(target, save(tmp_path, {"model": kept}), partial=True)
    assert "roi_heads.box_head.2.fc1.weight" in report.matched
    assert (target.roi_heads.box_head[0].fc1.weight == 0.5).all()
