"""Built detectors in configs: lazy nodes that refer to modules of this Python process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from detectron2.config import LazyCall as L
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.preprocess import channel_order

_modules: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def given_part(detector: str, name: str = "") -> nn.Module:
    """A module of a detector that :func:`refer_to` has registered, not a copy.

    Args:
        detector: the detector's key.
        name: the submodule's name; empty for the complete detector.

    Raises:
        UserError: this process has no such detector.
    """
    if detector not in _modules:
        raise UserError(
            f"the config refers to the detector object {detector}, which exists only in the Python "
            "process that built it: call region_pretrain.pretrain or finetune with it, or use the "
            "detector's config instead"
        )
    return _modules[detector].get_submodule(name)


#: The function in a config, which is its name once the config was saved.
_TARGETS = (given_part, f"{given_part.__module__}.{given_part.__name__}")


def detector_in(cfg: DictConfig) -> nn.Module | None:
    """The built detector of this process whose modules a config refers to, if it does."""

    def keys(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if node.get("_target_") in _TARGETS:
                yield node["detector"]
            node = list(node.values())
        if isinstance(node, list):
            for value in node:
                yield from keys(value)

    model = OmegaConf.to_container(cfg)["model"] if "model" in cfg else None
    return next((given_part(key) for key in keys(model)), None)


def without_numbers(key: str) -> str:
    """The key that :func:`refer_to` gives a detector if no other one has its shapes."""
    return re.sub(r"(-[0-9a-f]{8})-\d+$", r"\1", key)


def refer_to(detector: nn.Module) -> str:
    """Make a detector available to the configs of this process, while it exists.

    Returns:
        Its key: the class and a digest of the names and shapes of its parameters and buffers, so
        that it is the same in another process. A second detector of the same shapes gets a number.
    """
    facts = [(key, tuple(value.shape)) for key, value in detector.state_dict().items()]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    base = key = f"{type(detector).__name__}-{digest}"
    number = 1
    while _modules.get(key, detector) is not detector:
        number += 1
        key = f"{base}-{number}"
    _modules[key] = detector
    return key


def as_lazy_detector(detector: nn.Module) -> DictConfig:
    """A built detector as ``model`` of a config, whose modules are those of the detector.

    Raises:
        UserError: the module has no ``backbone`` or ``pixel_mean``.
    """
    if not all(hasattr(detector, name) for name in ("backbone", "pixel_mean", "pixel_std")):
        raise UserError(
            f"{type(detector).__name__} is not a detector: it lacks backbone, pixel_mean or "
            "pixel_std"
        )
    key, mean = refer_to(detector), detector.pixel_mean.flatten().tolist()

    def part(name: str) -> DictConfig:
        return L(given_part)(detector=key, name=name)

    node: dict[str, Any] = {
        "backbone": part("backbone"),
        "pixel_mean": mean,
        "pixel_std": detector.pixel_std.flatten().tolist(),
        "input_format": channel_order(getattr(detector, "input_format", None), mean),
    }
    heads = getattr(detector, "roi_heads", None)
    if heads is not None:
        node["roi_heads"] = _roi_heads(heads, part)
    if isinstance(getattr(detector, "head", None), nn.Module):
        node["head"] = part("head")
    return DictConfig(node, flags={"allow_objects": True})


def _roi_heads(heads: nn.Module, part: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("box_in_features", "in_features"):
        if getattr(heads, name, None):
            found[name] = list(getattr(heads, name))
    for name in ("box_pooler", "pooler", "res5"):
        if isinstance(getattr(heads, name, None), nn.Module):
            found[name] = part(f"roi_heads.{name}")
    box_head = getattr(heads, "box_head", None)
    if isinstance(box_head, nn.ModuleList):  # a Cascade R-CNN
        found["box_heads"] = [part(f"roi_heads.box_head.{i}") for i in range(len(box_head))]
    elif box_head is not None:
        found["box_head"] = part("roi_heads.box_head")
    return found


@contextmanager
def weights_kept(detector: nn.Module) -> Iterator[None]:
    """Undo what the constructor of a method does to the weights of a detector's modules."""
    weights = {name: value.clone() for name, value in detector.state_dict().items()}
    try:
        yield
    finally:
        detector.load_state_dict(weights)


@contextmanager
def training_modes_kept(module: nn.Module) -> Iterator[None]:
    """Restore train or eval mode of a module and its submodules after the context."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def modes_kept(detector: nn.Module) -> Iterator[None]:
    """Restore which parameters are trained, and train or eval mode, after the context.

    Layers that ``train.freeze`` keeps in eval mode follow ``train()`` and ``eval()`` again, and
    norms whose statistics a method made local are synchronised again.
    """
    classes = [(module, type(module), set(module._forward_hooks)) for module in detector.modules()]
    held = {module for module in detector.modules() if "train" in module.__dict__}
    gradients = [(p, p.requires_grad) for p in detector.parameters()]
    try:
        with training_modes_kept(detector):
            yield
    finally:
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.__dict__.pop("is_unread", None)  # see modeling/pyramid.py
        for module in detector.modules():
            if module not in held:
                module.__dict__.pop("train", None)
        for module, kind, hooks in classes:
            if type(module) is not kind:  # see modeling/norms.py
                module.__class__ = kind
                for number in set(module._forward_hooks) - hooks:
                    del module._forward_hooks[number]


def has_statistics(module: nn.Module) -> bool:
    """Whether some batch norm has seen data or loaded weights: its running mean is not zero."""
    return any(not mean.is_meta and bool(mean.any()) for mean in _running_means(module))


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module has batch norms, frozen or not, from which :func:`has_statistics` tells."""
    return next(_running_means(module), None) is not None


def _running_means(module: nn.Module) -> Iterator[Tensor]:
    return (value for name, value in module.named_buffers() if name.endswith("running_mean"))
