"""Files as other libraries and releases write them, with their names, for a ResNet-18 that is as
narrow as that of the Shapes configs (24 channels instead of 64)."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

State = dict[str, Tensor]
_NARROW = {64: 24, 128: 48, 256: 96, 512: 192}
FPN, FC = 48, 256


@cache
def names() -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and narrow shapes of torchvision's ResNet-18; timm's are equal."""
    wide = torchvision.models.resnet18(weights=None).state_dict()
    assert [*wide] == [*timm.create_model("resnet18").state_dict()]
    return tuple((k, tuple(_NARROW.get(d, d) for d in v.shape)) for k, v in wide.items())


def tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random values, and a count for a scalar."""
    generator = torch.Generator().manual_seed(seed)
    if not shape:
        return torch.tensor(seed)
    return torch.rand(shape, generator=generator) + 0.1


def resnet(prefix: str = "", seed: int = 0, fc: bool = False) -> State:
    """torchvision's state dict."""
    items = [item for item in names() if fc or not item[0].startswith("fc.")]
    return {prefix + k: tensor(1000 * seed + i, shape) for i, (k, shape) in enumerate(items)}


def norm(prefix: str, channels: int, seed: int) -> State:
    parts = ("weight", "bias", "running_mean", "running_var")
    state = {prefix + part: tensor(10 * seed + i, (channels,)) for i, part in enumerate(parts)}
    return state | {f"{prefix}num_batches_tracked": torch.tensor(3)}


def fpn(lateral: Callable, output: Callable, conv: str, bn: str) -> State:
    """An FPN with norms.

    Args:
        lateral, output: map a level, 0 for the finest, to the beginning of its layers' names.
        conv, bn: how the names of convolutions and norms go on.
    """
    state = {}
    for i, width in enumerate((24, 48, 96, 192)):
        for name, shape in ((lateral, (FPN, width, 1, 1)), (output, (FPN, FPN, 3, 3))):
            state[f"{name(i)}{conv}weight"] = tensor(i, shape)
            state |= norm(f"{name(i)}{bn}", FPN, 10 * i + shape[-1])
    return state


def mm_neck(prefix: str = "") -> State:
    """mmdetection's FPN, which SoCo's release copies."""
    lateral, output = (f"{prefix}neck.{kind}_convs.{{}}.".format for kind in ("lateral", "fpn"))
    return fpn(lateral, output, "conv.", "bn.")


def soco_head(prefix: str) -> State:
    state = {
        f"{prefix}head.fc1.weight": tensor(5, (FC, FPN * 49)),
        f"{prefix}head.fc1.bias": tensor(6, (FC,)),
    }
    for i in range(1, 5):
        state[f"{prefix}head.conv{i}.weight"] = tensor(i, (FPN, FPN, 3, 3))
        state |= norm(f"{prefix}head.bn{i}.", FPN, 50 + i)
    return state


def torchvision_fpn() -> State:
    """The backbone of a torchvision detector, whose FPN has norms."""
    trunk = torchvision.models.resnet18(weights=None)
    backbone = _resnet_fpn_extractor(trunk, 5, norm_layer=torch.nn.BatchNorm2d)
    names = [k for k in backbone.state_dict() if k.startswith("fpn.")]
    values = fpn("fpn.inner_blocks.{}.".format, "fpn.layer_blocks.{}.".format, "0.", "1.")
    assert values.keys() == set(names)
    return resnet("backbone.body.") | {f"backbone.{name}": values[name] for name in names}


def detectron2_names(state: State) -> State:
    """torchvision's names in Detectron2's form, by plain text replacement."""
    renamed = {}
    for name, value in state.items():
        if not name.startswith("layer"):
            name = f"stem.{name}"
        for old, new in [(f"layer{i}", f"res{i + 1}") for i in range(1, 5)] + [
            ("bn1", "conv1.norm"),
            ("bn2", "conv2.norm"),
            ("downsample.0", "shortcut"),
            ("downsample.1", "shortcut.norm"),
        ]:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def _own_c4() -> dict:
    trunk = detectron2_names(resnet())
    places = {True: "roi_heads.", False: "backbone."}
    return {"model": {places[k.startswith("res5")] + k: v for k, v in trunk.items()}}


def fpn_and_head() -> State:
    """The FPN and the box head of all files that have them, under Detectron2's names."""
    lateral, output = (f"backbone.fpn_{kind}{{}}.".format for kind in ("lateral", "output"))
    parts = fpn(lambda i: lateral(i + 2), lambda i: output(i + 2), "", "norm.")
    for name, value in soco_head("").items():
        name = re.sub(r"head\.bn(\d)", r"head.conv\1.norm", name)
        parts[name.replace("head.", "roi_heads.box_head.", 1)] = value
    return parts


def _own_fpn() -> dict:
    trunk = under("backbone.bottom_up.", detectron2_names(resnet()))
    return {"model": trunk | fpn_and_head(), "pretraining": {"x": torch.ones(1)}, "iteration": 3}


def _settings() -> dict:
    return {"args": argparse.Namespace(arch="resnet18", lr=0.03), "epoch": 200, "arch": "resnet18"}


#: Title -> content of the file. A title's last word is the file's name.
SOURCES: dict[str, Callable[[], object]] = {
    "torchvision ResNet resnet18.pth": lambda: OrderedDict(resnet(fc=True)),
    "timm ResNet resnet18.safetensors": lambda: resnet(fc=True),
    "torchvision detector fasterrcnn.pth": torchvision_fpn,
    "mmdetection detector epoch_12.pth": lambda: {
        "meta": {"CLASSES": ("a", "b")},
        "state_dict": OrderedDict(resnet("backbone.") | mm_neck()),
    },
    "mmpretrain, mmselfsup, OpenSelfSup epoch_100.pth": lambda: {
        "state_dict": resnet("backbone.") | resnet("target_net.0.", 1),
        "meta": {},
    },
    "MoCo v1, v2 checkpoint_0199.pth.tar": lambda: {
        "state_dict": resnet("module.encoder_k.", 1)
        | resnet("module.encoder_q.", fc=True)
        | {"module.queue": torch.ones(8, 4), "module.queue_ptr": torch.zeros(1).long()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        **_settings(),
    },
    "DenseCL densecl.pth": lambda: {"state_dict": resnet(), "author": "DenseCL"},
    "PixPro pixpro.pth": lambda: {
        "model": resnet("module.encoder_k.", 1) | resnet("module.encoder."),
        "opt": argparse.Namespace(arch="resnet18"),
    },
    "SwAV swav.pth.tar": lambda: resnet("module.")
    | {"module.prototypes.weight": torch.ones(30, 4)},
    "DINO checkpoint dino_checkpoint.pth": lambda: {
        "student": resnet("module.backbone.", 1),
        "teacher": resnet("backbone."),
        **_settings(),
    },
    "Barlow Twins barlow.pth": lambda: resnet(),
    "VICReg vicreg.pth": lambda: {
        "model": resnet("module.backbone.") | {"module.projector.0.weight": torch.ones(2, 2)},
        "epoch": 5,
    },
    "BYOL byol.pth": lambda: {
        "online_network": {},
        "model": resnet("target_encoder.net.", 1) | resnet("online_encoder.net."),
    },
    "Lightning last.ckpt": lambda: {
        "pytorch-lightning_version": "2.0",
        "state_dict": resnet("model.backbone."),
        "hyper_parameters": argparse.Namespace(depth=18),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "SoCo's release soco.pth": lambda: {
        "model": resnet("module.encoder.") | mm_neck("module.") | soco_head("module."),
        "model_ema": resnet("encoder.", 1) | mm_neck() | soco_head(""),
        "opt": argparse.Namespace(lr=1.0),
    },
    "CCOP's release ccop.pth": lambda: {
        "model": under("backbone_k.bottom_up.", detectron2_names(resnet(seed=1)))
        | {
            name.replace("backbone.", "backbone_q."): value
            for name, value in _own_fpn()["model"].items()
            if name.startswith("backbone.")
        }
    },
    "model zoo, converted from torchvision R-18.pkl": lambda: {
        "model": {k: v.numpy() for k, v in detectron2_names(resnet()).items()},
        "__author__": "torchvision",
        "matching_heuristics": True,
    },
    "this library, FPN detector model_final.pth": _own_fpn,
    "this library, C4 detector model_final.pth": _own_c4,
    "this library, bare trunk model_final.pth": lambda: {
        "model": under("backbone.", detectron2_names(resnet()))
    },
}


def write(title: str, folder: Path) -> str:
    """Write a source's file; return its path."""
    path, content = folder / title.split()[-1], SOURCES[title]()
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return str(path)
