"""Loading into a detector: the account that is given, and what is refused."""

import logging
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torchvision
from detectron2.config import LazyConfig, instantiate
from forked import LONG
from narrow_detector import PRETRAINED, build, detector_config, save, state
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.engine.transfer import load_pretrained, module_of
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import PretrainingModel


@pytest.fixture
def checkpoint(tmp_path) -> str:
    """As pre-training writes it: the detector's own tensors, and other entries next to them."""
    content = {
        "model": state(build(seed=1), *PRETRAINED),
        "pretraining": {"target.backbone.x": torch.ones(3)},
        "iteration": 7,
        "rng": [torch.get_rng_state()],
    }
    return save(tmp_path, content)


def test_pretrained_parts_are_filled_and_the_rest_is_called_new(checkpoint, caplog):
    model, source = build(seed=0), build(seed=1)
    before = state(model, "proposal_generator.", "roi_heads.box_predictor", "roi_heads.mask_head")
    with caplog.at_level(logging.INFO, "region_pretrain"):
        report = load_pretrained(model, checkpoint)

    after = model.state_dict()
    expected = state(source, *PRETRAINED)
    assert sorted(report.matched) == sorted(expected)
    assert all(torch.equal(after[k], v) for k, v in expected.items())
    assert sorted(report.missing) == sorted(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert report.unexpected == [] and report.mismatched == []

    # stem 1 + 4 blocks of 2 + 2 shortcuts of res3, res5: 11 convolutions, each with a BN of 5
    assert list(report.modules) == [
        "backbone.fpn",
        "backbone.bottom_up",
        "proposal_generator",
        "roi_heads.box_head",
        "roi_heads.box_predictor",
        "roi_heads.mask_head",
    ]
    body = report.modules["backbone.bottom_up"]
    assert (body.loaded_tensors, body.tensors) == (66, 66)
    assert body.loaded_values == sum(v.numel() for k, v in expected.items() if "bottom_up" in k)
    head = report.modules["roi_heads.box_head"]
    assert (head.loaded_tensors, head.tensors, head.values) == (2, 2, 16 * 49 * 32 + 32)
    assert report.modules["proposal_generator"].loaded_tensors == 0

    logged = [r.getMessage() for r in caplog.records if r.name.startswith("region_pretrain")]
    assert logged == [report.summary()]
    lines = {line.split()[0]: line.split() for line in report.summary().splitlines()}
    assert lines["backbone.bottom_up"][1:] == [
        "66/66",
        f"{body.values:,}/{body.values:,}",
        "loaded",
    ]
    assert lines["proposal_generator"][1].startswith("0/")
    assert lines["proposal_generator"][-1] == "new"


def test_missing_batch_counters_are_not_reported(tmp_path):
    weights = state(build(seed=1), "backbone.")
    weights = {k: v for k, v in weights.items() if "num_batches" not in k}
    report = load_pretrained(build(), save(tmp_path, {"model": weights}))
    body = report.modules["backbone.bottom_up"]
    assert (body.loaded_tensors, body.tensors) == (55, 55)
    assert not [k for k in report.missing if "num_batches" in k]


def test_counters_that_a_frozen_norm_lacks_are_not_reported(checkpoint):
    report = load_pretrained(build(norm="FrozenBN"), checkpoint)
    assert report.unexpected == []
    assert report.modules["backbone.bottom_up"].loaded_tensors == 55


def test_a_checkpoint_that_shares_no_tensor_is_an_error_with_names_of_both_sides(tmp_path):
    weights = {f"module.encoder_q.layer1.0.conv{i}.weight": torch.ones(2) for i in range(5)}
    path = save(tmp_path, {"model": weights})
    with pytest.raises(UserError, match="no tensor of .*model_final.pth fits") as error:
        load_pretrained(build(), path)
    assert "encoder_q.layer1.0.conv0.weight" in str(error.value)
    assert "backbone.fpn_lateral2.weight" in str(error.value)
    assert "read as an unrecognised network" in str(error.value)
    assert "?as=LIBRARY" in str(error.value)


def test_tensors_that_the_model_lacks_are_counted_by_module(tmp_path):
    weights = {f"encoder_q.layer1.0.conv{i}.weight": torch.ones(2) for i in range(5)}
    path = save(tmp_path, {"model": {**state(build(seed=1), *PRETRAINED), **weights}})
    report = load_pretrained(build(), path)
    assert report.matched and sorted(report.unexpected) == sorted(weights)
    assert "not used by this model: encoder_q (5)" in report.summary()


def test_another_architecture_is_an_error(tmp_path, checkpoint):
    with pytest.raises(UserError, match="another architecture") as error:
        load_pretrained(build(width=24), checkpoint)
    assert "backbone.fpn_lateral2.weight: (16, 8, 1, 1) in the file, (24, 8, 1, 1) here" in str(
        error.value
    )


@pytest.mark.parametrize(("depth", "title"), [(18, "a ResNet"), (34, None), (50, None)])
def test_the_same_network_of_another_width_is_called_so(tmp_path, depth, title):
    """The trunk of the Shapes configs is narrower than torchvision's and timm's."""
    model = instantiate(get_config("detection/mask_rcnn_r18_fpn_shapes.py").model)
    path = save(tmp_path, getattr(torchvision.models, f"resnet{depth}")().state_dict())
    with pytest.raises(UserError) as error:
        load_pretrained(model, path)
    text = "is the detector's network with another width: 64 channels after the stem instead of 24"
    assert (f"{path}, read as {title}, {text}" in str(error.value)) == (title is not None)
    assert ("Pre-train with this detector's config" in str(error.value)) == (title is None)


def test_another_number_of_classes_is_a_warning(tmp_path, caplog):
    source = build(seed=1, classes=5)
    path = save(tmp_path, {"model": source.state_dict()})
    model = build(classes=3)
    report = load_pretrained(model, path)
    assert {name for name, _, _ in report.mismatched} == {
        f"roi_heads.{layer}.{kind}"
        for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
        for kind in ("weight", "bias")
    }
    shapes = {name: shapes for name, *shapes in report.mismatched}
    assert shapes["roi_heads.box_predictor.cls_score.bias"] == [(6,), (4,)]
    assert report.missing == []
    assert report.modules["roi_heads.box_predictor"].loaded_tensors == 0
    assert "cls_score.bias is not loaded" in caplog.text


def zoo_weights(model: nn.Module) -> dict:
    """A bare backbone in the layout of the model zoo's converted ImageNet files."""
    prefix = "backbone.bottom_up."
    return {k[len(prefix) :]: v.numpy() for k, v in state(model, prefix).items()}


def test_model_zoo_pickle_is_matched_by_its_short_names(tmp_path):
    source, model = build(seed=1), build(seed=0)
    path = tmp_path / "R-tiny.pkl"
    content = {"model": zoo_weights(source), "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    report = load_pretrained(model, str(path))
    assert report.modules["backbone.bottom_up"].loaded_tensors == 66
    assert report.modules["backbone.fpn"].loaded_tensors == 0
    loaded, expected = state(model, "backbone.bottom_up"), state(source, "backbone.bottom_up")
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())


class Pretraining(PretrainingModel):
    """A detector's modules, and a copy of them with the same names after a prefix."""

    detector_modules = ("backbone",)

    def __init__(self):
        super().__init__()
        self.backbone = build(seed=0).backbone
        self.target = nn.ModuleDict({"backbone": build(seed=0).backbone})
        self.projector = nn.Linear(2, 2)

    def forward(self, batch):
        return {}


@pytest.mark.parametrize("short", [True, False])
def test_a_pretraining_model_gets_the_detectors_own_modules(tmp_path, checkpoint, short):
    source, model = build(seed=1), Pretraining()
    path = tmp_path / "R-tiny.pkl"
    content = {"model": zoo_weights(source), "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    report = load_pretrained(model, str(path) if short else checkpoint)
    assert list(report.modules) == ["backbone.fpn", "backbone.bottom_up"]
    assert report.modules["backbone.bottom_up"].loaded_tensors == 66
    name = "backbone.bottom_up.res3.0.conv1.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert torch.equal(model.state_dict()["target." + name], build(seed=0).state_dict()[name])


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True", "?as=detectron2"])
def test_a_bare_backbone_is_recognised(tmp_path, query):
    weights = {k: torch.from_numpy(v) for k, v in zoo_weights(build(seed=1)).items()}
    path = save(tmp_path, {"model": weights})
    report = load_pretrained(build(), path + query)
    assert report.modules["backbone.bottom_up"].loaded_tensors == 66


def test_heuristics_do_not_hide_another_architecture(tmp_path):
    weights = {k: torch.from_numpy(v) for k, v in zoo_weights(build(seed=1)).items()}
    weights["res5.0.conv1.weight"] = torch.zeros(64, 16, 3, 3)
    path = save(tmp_path, {"model": weights}) + "?matching_heuristics=True"
    with pytest.raises(UserError, match="another architecture") as error:
        load_pretrained(build(), path)
    name = "backbone.bottom_up.res5.0.conv1.weight"
    assert f"{name}: (64, 16, 3, 3) in the file, (32, 16, 3, 3) here" in str(error.value)


class Runs:
    """An object whose loading runs code."""

    def __reduce__(self):
        return exec, ("import sys; sys.ran_from_checkpoint = True",)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_a_checkpoint_cannot_run_code(tmp_path, name):
    content = {"model": state(build(), "backbone."), "extra": Runs()}
    path = tmp_path / name
    if name.endswith("pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"{name}.*(builtins.exec|exec)"):
        load_pretrained(build(), str(path))
    assert not hasattr(sys, "ran_from_checkpoint")


def test_pickled_tensors_are_as_good_as_arrays(tmp_path):
    path = tmp_path / "tensors.pkl"
    content = {"model": state(build(seed=1), *PRETRAINED), "__author__": "test"}
    path.write_bytes(pickle.dumps(content))
    assert load_pretrained(build(), str(path)).modules["roi_heads.box_head"].loaded_tensors == 2


def test_files_that_are_not_checkpoints(tmp_path, checkpoint):
    def message(path) -> str:
        with pytest.raises(UserError) as error:
            load_pretrained(build(), str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "the path is empty" in message("")
    assert "none.pth: no such file" in message(tmp_path / "none.pth")

    half = tmp_path / "half.pth"
    data = open(checkpoint, "rb").read()
    half.write_bytes(data[: len(data) // 2])
    assert "cannot read the checkpoint" in message(half) and "half.pth" in message(half)

    (tmp_path / "run").mkdir()
    assert message(tmp_path / "run") == (
        f"cannot read the checkpoint {tmp_path}/run/model_final.pth: no such file: name one of its "
        "checkpoints, or finish the run"
    )
    picture = tmp_path / "picture.pth"
    picture.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)) * 8)
    assert "cannot read the checkpoint" in message(picture)
    empty = tmp_path / "empty.pth"
    empty.write_bytes(b"")
    assert "cannot read the checkpoint" in message(empty)
    pickled = pickle.dumps({"model": zoo_weights(build()), "__author__": "test"})
    for name, content in (
        ("half.pkl", pickled[: len(pickled) // 2]),
        ("picture.pkl", picture.read_bytes()),
        ("empty.pkl", b""),
    ):
        (tmp_path / name).write_bytes(content)
        text = message(tmp_path / name)
        assert "cannot read the checkpoint" in text and f"{name}: it is damaged" in text

    assert "contains a list" in message(save(tmp_path, [torch.ones(2)], "list.pth"))
    nested = {"state_dict": {"a": torch.ones(2)}, "epoch": 3, "arch": "resnet50"}
    text = message(save(tmp_path, nested, "moco.pth"))
    assert "no tensor" in text and "in 'state_dict' and has names such as a;" in text
    assert "no named tensors" in message(save(tmp_path, {"model": {}}, "bare.pth"))


def test_module_of_tells_apart_what_pretraining_fills():
    assert module_of("backbone.bottom_up.res2.0.conv1.weight") == "backbone.bottom_up"
    assert module_of("backbone.fpn_output5.norm.weight") == "backbone.fpn"
    assert module_of("backbone.simfp_2.0.weight") == "backbone.fpn"
    assert module_of("backbone.net.blocks.0.norm1.weight") == "backbone.net"
    assert module_of("backbone.res4.0.conv1.weight") == "backbone"  # C4
    assert module_of("roi_heads.res5.norm.weight") == "roi_heads.res5"
    assert module_of("head.cls_score.weight") == "head"
    assert module_of("head.bbox_subnet.0.weight") == "head.bbox_subnet"


def test_stock_detectron2_loads_the_same_file_without_this_library(tmp_path, checkpoint):
    LazyConfig.save(detector_config(), str(tmp_path / "detector.yaml"))
    program = textwrap.dedent("""
        import logging, sys
        sys.modules["region_pretrain"] = None  # importing it raises ImportError
        import torch
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import LazyConfig, instantiate

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        model = instantiate(LazyConfig.load(sys.argv[1]))
        rest = DetectionCheckpointer(model).load(sys.argv[2])
        weights = torch.load(sys.argv[2], weights_only=True)["model"]
        loaded = model.state_dict()
        assert len(weights) == 116 and all(torch.equal(loaded[k], v) for k, v in weights.items())
        assert "pretraining" in rest and not any("region_pretrain." in m for m in sys.modules)
        """)
    command = [sys.executable, "-W", "ignore", "-c", program]
    command += [str(tmp_path / "detector.yaml"), checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=LONG)
    assert done.returncode == 0, done.stderr
    # one warning: what is honestly new. None about unused or misshapen tensors.
    named = [line for line in done.stderr.splitlines() if "." in line and "{" in line]
    assert named and all("proposal_generator" in n or "roi_heads" in n for n in named), done.stderr
    assert "box_head" not in done.stderr and "backbone" not in done.stderr
    assert "not used by the model" not in done.stderr and "incompatible" not in done.stderr
