"""The contract between the engine and a pre-training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from region_pretrain.contract import Contract
from region_pretrain.data.batch import ViewBatch
from region_pretrain.errors import UserError, did_you_mean
from region_pretrain.modeling.momentum import MomentumCopy


class PretrainingModel(nn.Module, Contract, ABC):
    """Base class of every pre-training meta-architecture.

    A method provides :meth:`forward` and :attr:`detector_modules`, and overrides the hooks it
    needs. The engine calls hooks on the model itself, not on its DDP wrapper, and once per
    iteration, however many micro-batches an optimiser step accumulates.

    Momentum copies need no bookkeeping: the engine finds every
    :class:`~region_pretrain.modeling.momentum.MomentumCopy` in the model and renews it after
    ``train.init_checkpoint`` has been loaded into the online network.

    Attributes:
        detector_modules: names of the top-level submodules that belong to the detector, e.g.
            ``("backbone", "roi_heads")``. Their entries in the state dict are saved under these
            names as the checkpoint's ``"model"``; all other entries are its ``"pretraining"``.
    """

    @property
    @abstractmethod
    def detector_modules(self) -> tuple[str, ...]:
        """A class attribute in most subclasses."""

    @abstractmethod
    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Returns:
            Scalars by name. Those whose names start with ``loss`` are summed and minimised; the
            others are only logged.
        """

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Called before the forward pass, e.g. for momentum updates or a curriculum.

        Args:
            iteration: number of the iteration, from 0.
            max_iter: number of iterations of the run.
        """

    def after_step(self, iteration: int, max_iter: int) -> None:
        """Called after the optimiser's step; arguments as for :meth:`before_step`."""

    def on_weights_loaded(self) -> None:
        """Called once ``train.init_checkpoint`` is loaded and the momentum copies are renewed."""

    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]] | None:
        """Visualise what the method computes; in eval mode.

        ``tools/visualize.py --method`` calls this, and during a run the hook of ``train.pictures``,
        in all processes together.

        Returns:
            For each image of the batch a row of ``(H, W, 3)`` uint8 RGB pictures, or None if the
            method has nothing to show beyond its views.
        """
        return None


def check_contract(model: Any) -> PretrainingModel:
    """Check that a model can be pre-trained, before training starts.

    Args:
        model: the module that ``cfg.model`` builds.

    Returns:
        The model.

    Raises:
        UserError: the model is not a :class:`PretrainingModel`, or has no submodule of a name in
            ``detector_modules``.
    """
    if not isinstance(model, PretrainingModel):
        raise UserError(
            f"model builds a {type(model).__name__}, which is not a PretrainingModel: a "
            "pre-training method subclasses region_pretrain.modeling.meta_arch.PretrainingModel"
        )
    children = dict(model.named_children())
    missing = [name for name in model.detector_modules if name not in children]
    if missing or not model.detector_modules:
        raise UserError(
            f"{type(model).__name__}.detector_modules={tuple(model.detector_modules)} must name "
            f"submodules of the model, which has {', '.join(children)}"
        )
    return model


def check_names(model: PretrainingModel, names: Collection[str]) -> None:
    """Check that the modules that a model shares with its detector have the detector's names.

    Args:
        model: see :func:`check_contract`.
        names: of the detector's modules, at least its own and those of its ``roi_heads``.

    Raises:
        UserError: one has another name, so that the detector would not load its weights.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        top, _, rest = name.partition(".")
        is_compared = not rest or (top == "roi_heads" and "." not in rest)
        if not is_compared or top not in model.detector_modules or name in names:
            continue
        if module.state_dict():
            raise UserError(
                f"{type(model).__name__}.detector_modules: the detector has no module {name!r}, so "
                f"its weights would not be loaded{did_you_mean(name, names)}"
            )


def check_output(output: Any) -> None:
    """Check what the ``forward`` of a model in training returns; waits for no device.

    Args:
        output: scalars by name, as :meth:`PretrainingModel.forward` returns them.

    Raises:
        UserError: it is no dict, a loss is not a tensor of one element, or another entry is neither
            that nor a number.
    """
    if not isinstance(output, Mapping):
        raise UserError(
            f"the model's forward returns a {type(output).__name__}: return a dict of scalars, "
            "e.g. {'loss': value}; those whose names start with loss are summed and minimised"
        )
    for name, value in output.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}: return a scalar, e.g. its mean"
        elif isinstance(value, Tensor) or (isinstance(value, Real) and not name.startswith("loss")):
            continue
        elif name.startswith("loss"):
            found = f"a {type(value).__name__}: a loss must be a tensor that has a gradient"
        else:
            found = f"a {type(value).__name__}: what is logged must be a scalar"
        raise UserError(f"the model's forward returns {name!r}, {found}")


def detector_part(model: nn.Module) -> nn.Module:
    """A model without what only pre-training needs, e.g. a target network with the same names.

    Args:
        model: a pre-training model, or a detector, which is returned.
    """
    if not isinstance(model, PretrainingModel):
        return model
    part = nn.Module()
    for name in model.detector_modules:
        part.add_module(name, model.get_submodule(name))
    return part


def renew_momentum_copies(model: PretrainingModel) -> None:
    """Set every momentum copy in a model to its online network, then notify the model."""
    for module in model.modules():
        if isinstance(module, MomentumCopy):
            module.renew()
    model.on_weights_loaded()
