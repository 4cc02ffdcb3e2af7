"""Which layers are trained: freezing some, and finding those that would stay as they are."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from region_pretrain.engine.transfer import is_trunk
from region_pretrain.errors import UserError, first_few
from region_pretrain.modeling.given import detector_in, has_statistics, keeps_statistics
from region_pretrain.modeling.meta_arch import PretrainingModel, detector_part
from region_pretrain.overrides import dotted_keys

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze modules of a detector, for probes of pre-trained weights.

    Their parameters are not trained, and their layers stay in eval mode: batch norm uses its
    running statistics, dropout and stochastic depth are off.

    Args:
        model: the detector, before its optimiser is built.
        patterns: names of modules, e.g. ``backbone.bottom_up`` or ``roi_heads.box_head.conv*``; a
            module is frozen with everything in it.

    Raises:
        UserError: a pattern matches no module, nothing is left to train, or the model is a
            pre-training model, whose momentum copies would no longer follow.
    """
    if not patterns:
        return
    if isinstance(model, PretrainingModel):
        raise UserError(f"train.freeze={list(patterns)} is for fine-tuning: set it to []")
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, modules, n=3)
            near = near or [name for name, _ in model.named_children()]
            raise UserError(
                f"train.freeze: {pattern!r} matches no module of the detector, which has "
                f"{', '.join(near)}"
            )
        for name in matched:
            modules[name].requires_grad_(False)
            for layer in modules[name].modules():
                if _depends_on_mode(layer):
                    _keep_in_eval_mode(layer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UserError(f"train.freeze={list(patterns)} leaves nothing to train")
    total = sum(p.numel() for p in model.parameters())
    counts = f"{trained:,} of {total:,} parameters are trained"
    logger.info("frozen: %s; %s", ", ".join(patterns), counts)


def _depends_on_mode(layer: nn.Module) -> bool:
    """Leaves, and timm's norms and attentions, which contain others.

    Detectron2 asks its heads and the detector itself whether they are in training.
    """
    is_leaf = next(layer.children(), None) is None
    return is_leaf or isinstance(layer, _BatchNorm) or hasattr(layer, "attn_drop")


def _keep_in_eval_mode(layer: nn.Module) -> None:
    layer.eval()
    layer.train = lambda mode=True: layer  # what train() and eval() of its parents call


def check_groups(cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimiser updates all parameters that are trained.

    Raises:
        UserError: ``cfg.optimizer.params`` leaves out parameters with ``requires_grad``.
    """
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, key in trained.items() if key not in updated]
    if missing:
        groups = cfg.optimizer.params.get("_target_")
        raise UserError(
            f"optimizer.params: {getattr(groups, '__name__', groups)} leaves out {len(missing)} of "
            f"{len(trained)} trained parameters ({first_few(missing, 3)}): put them into a group, "
            "or freeze them in the model (requires_grad_(False))"
        )


def check_trainable(cfg: DictConfig, model: nn.Module, loaded: Collection[str] = ()) -> None:
    """Check that no layer of a detector is frozen at its initialisation.

    These are parameters of the trunk without gradient, and frozen batch norms, which are
    identities until weights are loaded. Methods may freeze parts of the FPN that they do not use.
    A model into which nothing was loaded passes if its batch norms have statistics, because it was
    built with weights. Whether a built detector without batch norms has weights cannot be known.

    Args:
        cfg: the config; ``cfg.model`` builds ``model``.
        model: a pre-training model. For a detector, and for one that was passed built and has no
            batch norms, this is only a warning.
        loaded: names of the tensors that a checkpoint has filled.

    Raises:
        UserError: there are such layers; the message tells how to unfreeze them.
    """
    message = frozen_without_weights(cfg, model, loaded)
    if message and isinstance(model, PretrainingModel) and not _is_unknown(cfg, model):
        raise UserError(message)
    if message:
        logger.warning(message)


def frozen_without_weights(cfg: DictConfig, model: nn.Module, loaded: Collection[str] = ()) -> str:
    """The message of :func:`check_trainable`, which has the same arguments; "" if all is well."""
    part = detector_part(model)
    if not loaded and has_statistics(part):  # a built detector with weights
        return ""
    frozen = [
        name
        for name, parameter in part.named_parameters()
        if not parameter.requires_grad
        and not getattr(parameter, "is_unread", False)
        and name not in loaded
        and is_trunk(name)
    ]
    norms = [
        name
        for name, module in part.named_modules()
        # Detectron2's, torchvision's and timm's
        if type(module).__name__.startswith("FrozenBatchNorm")
        and f"{name}.running_var" not in loaded
    ]
    found = [
        f"{len(names)} {what}, e.g. {names[0]}"
        for names, what in ((frozen, "parameters"), (norms, "batch norms"))
        if names
    ]
    if not found:
        return ""
    changes = " ".join(_unfreezing(cfg))
    mend = f"add {changes}" if changes else "call requires_grad_(True) on them"
    if _is_unknown(cfg, model):
        what, mend = (
            "the detector freezes layers that may lack weights",
            f"if they are random, {mend}",
        )
    elif detector_in(cfg) is not None:
        what = "the detector freezes layers without weights"
    else:
        what = "the detector's config freezes layers without weights"
    given = "or give their weights with train.init_checkpoint"
    return f"{what} ({'; '.join(found)}): {mend}, {given}"


def _is_unknown(cfg: DictConfig, model: nn.Module) -> bool:
    """Whether nothing shows if the weights of a detector that was passed built are random."""
    return detector_in(cfg) is not None and not keeps_statistics(detector_part(model))


def _unfreezing(cfg: DictConfig) -> list[str]:
    """The overrides that leave nothing of ``cfg.model`` frozen."""
    changes = []
    for key in dotted_keys(OmegaConf.to_container(cfg.model, resolve=False), "model."):
        value = OmegaConf.select(cfg, key)
        key = key.rpartition(".cfg.")[2]  # of a yacs config
        if key.lower().endswith("freeze_at") and value:
            changes.append(f"{key}=0")
        elif value == "FrozenBN":
            changes.append(f"{key}=SyncBN")
    if cfg.get("train", {}).get("freeze"):
        changes.append("train.freeze=[]")
    of_yacs = [change for change in changes if change.startswith("MODEL.")]
    if of_yacs and OmegaConf.select(cfg, "model.backbone.norm") == "":  # of the FPN
        of_yacs.append("MODEL.FPN.NORM=SyncBN")
    return of_yacs or changes
