"""The training loop of pre-training and fine-tuning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from math import isfinite, isnan, nan
from typing import Any

import torch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.data.batch import ViewBatch
from region_pretrain.engine.build import one_image_at_a_time
from region_pretrain.engine.memory import peak_memory_mib
from region_pretrain.errors import NonFiniteLoss, UserError, describe, first_few
from region_pretrain.modeling.meta_arch import PretrainingModel, check_output

logger = logging.getLogger(__name__)

#: What a model receives: a pre-training batch, or Detectron2's list with one dict per image.
Batch = ViewBatch | list[dict[str, Any]]
#: Losses are checked for NaN at least this often (in iterations), even if the log period is longer.
_MAX_UNCHECKED = 1000
_REMEDY = "A lower optimizer.lr, a longer warm-up, train.clip_grad or bfloat16 may help"
_LEAST_SCALE = 1e-3  # of a loss in float16; it starts at 65,536 and is halved at each skipped step
_HISTORY = 100  # values that are kept of each metric, for averages


class StepScalars(EventStorage):
    """Scalars that a model reports during one step, kept on their device.

    Models report with ``get_event_storage().put_scalar(name, value)``. The run's own storage
    converts each value to a Python float immediately, which waits for the device. This one keeps
    the tensors, and at the log period the trainer moves all of them to the run's storage at once.

    Args:
        storage: the run's storage, which receives images and histograms directly.
    """

    def __init__(self, storage: EventStorage) -> None:
        super().__init__(storage.iter)
        self._storage = storage
        self.values: dict[str, list[Tensor | float]] = {}
        self.hints: dict[str, bool] = {}

    def put_scalar(
        self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        name = self._current_prefix + name
        if isinstance(value, Tensor):
            value = value.detach()
        self.values.setdefault(name, []).append(value)
        self.hints[name] = smoothing_hint

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        self._storage.put_image(img_name, img_tensor)

    def put_histogram(self, hist_name: str, hist_tensor: Tensor, bins: int = 1000) -> None:
        self._storage.put_histogram(hist_name, hist_tensor, bins)


def _mean(values: list[float]) -> float:
    """The mean, for metrics without NaN: a spread is undefined where a process has one vector."""
    defined = [v for v in values if not isnan(v)]
    return sum(defined) / len(defined) if defined else nan


def _is_worth_a_traceback(record: logging.LogRecord) -> bool:
    """False for a ``UserError``. Detectron2's loop logs the traceback of every exception."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


logging.getLogger("detectron2.engine.train_loop").addFilter(_is_worth_a_traceback)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch for gradient accumulation.

    Args:
        batch: this process's batch.
        parts: number of micro-batches, whose sizes differ by at most one.

    Returns:
        The micro-batches in order.

    Raises:
        UserError: the batch has fewer images than parts.
    """
    if parts == 1:
        return [batch]
    size = len(batch)
    if size < parts:
        raise UserError(
            f"train.accumulate_steps={parts}, but a process loads only {size} images per step: "
            "lower it or raise dataloader.train.total_batch_size"
        )
    if not isinstance(batch, list):
        return batch.chunk(parts)
    cuts = [size * i // parts for i in range(parts + 1)]
    return [batch[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class Trainer(TrainerBase):
    """One optimiser step per iteration, with gradients accumulated over micro-batches.

    The model is a Detectron2 detector, or a
    :class:`~region_pretrain.modeling.meta_arch.PretrainingModel`, whose ``before_step`` and
    ``after_step`` are called once per iteration. It maps a batch to a dict: entries whose names
    start with ``loss`` are summed and minimised, the others are logged.

    The trainer waits for the device only at the log period and in :meth:`check_finite` (and in a
    float16 ``GradScaler``, which must know whether to skip the step).

    Args:
        model: on its device, wrapped in DDP if there are several processes.
        optimizer: over the model's parameters.
        data: called once with (first iteration, max_iter); yields one batch per iteration.
        device: where pre-training batches are sent; a detector moves its inputs itself.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` for mixed precision, None for float32.
        accumulate_steps: number of micro-batches that each batch is split into.
        max_norm: clip the total norm of the gradients.
        max_value: clip each entry of the gradients instead.
        log_period: gather metrics every this many iterations and after the last one.
        last_checkpoint: returns the path of the last good checkpoint, for the message about a NaN.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Callable[[int, int], Iterable[Batch]],
        *,
        device: str | torch.device = "cpu",
        amp_dtype: torch.dtype | None = None,
        accumulate_steps: int = 1,
        max_norm: float | None = None,
        max_value: float | None = None,
        log_period: int = 20,
        last_checkpoint: Callable[[], str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.train()
        self.optimizer = optimizer
        self.data = data
        self.device = torch.device(device)
        self.amp_dtype = amp_dtype
        self.accumulate_steps = accumulate_steps
        self.max_norm = max_norm
        self.max_value = max_value
        self.log_period = log_period
        self.last_checkpoint = last_checkpoint
        self.module = model.module if isinstance(model, DistributedDataParallel) else model
        self._method = self.module if isinstance(self.module, PretrainingModel) else None
        self.scaler = None
        if amp_dtype == torch.float16 and self.device.type == "cuda":
            self.scaler = torch.amp.GradScaler("cuda")
        self._batches = self._next_batch = None
        self._unchecked: list[tuple[int, list[str], Tensor]] = []
        self._reset_clocks()

    def is_log_step(self) -> bool:
        """Whether metrics are gathered in the current iteration."""
        return (self.iter + 1) % self.log_period == 0 or self.iter == self.max_iter - 1

    def before_train(self) -> None:
        # Detectron2 would keep every value that was ever logged.
        self.storage._history.default_factory = partial(HistoryBuffer, max_length=_HISTORY)
        # Starting a loader may draw from the global generators. The first batch is therefore loaded
        # before the hooks run, one of which restores the generators of a resumed run.
        if self.start_iter < self.max_iter:
            self._batches = iter(self.data(self.start_iter, self.max_iter))
            self._next_batch = self._load()
        self._reset_clocks()
        super().before_train()

    def after_train(self) -> None:
        self._batches = self._next_batch = None  # ends the loader's workers
        self.iter = min(self.iter, self.max_iter)  # more if a finished run is resumed
        super().after_train()

    def run_step(self) -> None:
        if not self.model.training:
            raise RuntimeError("the model was left in eval mode; a hook must call model.train()")
        started = time.perf_counter()
        batch, self._next_batch = self._next_batch, None
        if batch is None:
            batch = self._load()
        if not isinstance(batch, list):
            batch = batch.to(self.device)
        self._data_seconds += time.perf_counter() - started

        if self._method is not None:
            self._method.before_step(self.iter, self.max_iter)
        scalars = StepScalars(self.storage)
        losses = self._forward_backward(batch, scalars)
        if self.iter == self.start_iter and self._method is not None:
            self._warn_of_untrained()
        self.after_backward()
        self._optimizer_step(scalars)
        if self._method is not None:
            self._method.after_step(self.iter, self.max_iter)

        names = list(losses)
        values = torch.stack([losses[name].float().reshape(()) for name in names])
        self._unchecked.append((self.iter, names, values))
        self._images += len(batch)
        self._steps += 1
        if self.is_log_step() or len(self._unchecked) >= _MAX_UNCHECKED:
            self.check_finite()  # waits for the device, so the time below includes its work
        self._step_seconds += time.perf_counter() - started
        if self.is_log_step():
            self._write_metrics(losses, scalars)

    def _warn_of_untrained(self) -> None:
        names = [
            n for n, p in self._method.named_parameters() if p.requires_grad and p.grad is None
        ]
        if names:
            logger.warning(
                "%d parameters got no gradient in the first step, e.g. %s: if they are never used, "
                "freeze them; region_pretrain.modeling.pyramid.freeze_unread does so for an "
                "FPN's unread levels",
                len(names),
                first_few(names, 3),
            )

    def _load(self) -> Batch:
        try:
            return next(self._batches)
        except (ConnectionError, EOFError) as error:
            raise RuntimeError(f"DataLoader worker sent no batch ({describe(error)})") from error
        except StopIteration:
            raise UserError(
                f"the training data ended before iteration {self.iter} of {self.max_iter}: "
                "dataloader.train must yield one batch per iteration"
            ) from None

    def _forward_backward(self, batch: Batch, scalars: StepScalars) -> dict[str, Tensor]:
        """Fill the gradients.

        Returns:
            ``total_loss`` and each loss, averaged over the micro-batches: 0-D tensors on the
            device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parts = split_batch(batch, self.accumulate_steps)
        distributed = isinstance(self.model, DistributedDataParallel)
        mean: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            fraction = len(part) / len(batch) if len(parts) > 1 else 1.0
            reduce = i == len(parts) - 1 or not distributed
            with nullcontext() if reduce else self.model.no_sync():
                with self._autocast(), scalars:
                    try:
                        output = self.model(part)
                    except FloatingPointError as error:  # of Detectron2's proposals
                        diverged = NonFiniteLoss(
                            f"training has diverged at iteration {self.iter}: {error} "
                            f"{self._last_good()}"
                        )
                        # The weights, but not the images, are those of all processes.
                        alone = comm.get_world_size() > 1 and self._weights_are_finite()
                        diverged.everywhere = not alone
                        raise diverged from error
                    except ValueError as error:  # PyTorch's text
                        if len(part) > 1 or "more than 1 value per channel" not in str(error):
                            raise
                        total = len(batch) * comm.get_world_size()
                        raise UserError(one_image_at_a_time(total, len(parts))) from None
                    if self.iter == self.start_iter:
                        check_output(output)
                    losses = {k: v for k, v in output.items() if k.startswith("loss")}
                    if not losses:
                        raise RuntimeError(f"the model returned no loss, only {list(output)}")
                    total = sum(losses.values())
                objective = total * fraction if len(parts) > 1 else total
                (self.scaler.scale(objective) if self.scaler else objective).backward()
            for name in output.keys() - losses.keys():
                scalars.put_scalar(name, output[name])
            for name, value in {"total_loss": total, **losses}.items():
                mean[name] = mean.get(name, 0) + value.detach() * fraction
        return mean

    def _autocast(self):
        if self.amp_dtype is None:
            return nullcontext()
        return torch.amp.autocast(self.device.type, dtype=self.amp_dtype)

    def _optimizer_step(self, scalars: StepScalars) -> None:
        if self.max_norm is not None or self.max_value is not None:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            params = [p for g in self.optimizer.param_groups for p in g["params"]]
            if self.max_value is not None:
                torch.nn.utils.clip_grad_value_(params, self.max_value)
            else:
                norm = torch.nn.utils.clip_grad_norm_(params, self.max_norm)
                scalars.put_scalar("grad_norm", norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def check_finite(self) -> None:
        """Check the losses of all iterations since the last check. All processes call it together.

        Raises:
            NonFiniteLoss: a loss was NaN or infinite, on any process.
        """
        first_bad = None
        if self._unchecked:
            finite = torch.stack([values.isfinite().all() for _, _, values in self._unchecked])
            if not finite.all():
                iteration, names, values = self._unchecked[finite.tolist().index(False)]
                bad = {n: v for n, v in zip(names, values.tolist(), strict=True) if not isfinite(v)}
                if len(bad) > 1:  # name the terms at fault, not their sum
                    bad.pop("total_loss", None)
                first_bad = (iteration, bad)
        self._unchecked.clear()
        if first_bad is None and self.scaler and self.scaler.get_scale() < _LEAST_SCALE:
            # The scaler skips their steps, so losses and weights stay finite.
            first_bad = (self.iter, {"gradients of all recent steps": nan})
        found = [(*bad, rank) for rank, bad in enumerate(comm.all_gather(first_bad)) if bad]
        if not found:
            return
        iteration, losses, rank = min(found, key=lambda entry: entry[0])
        raise NonFiniteLoss(
            f"loss became NaN or infinite at iteration {iteration}"
            + (f" on rank {rank}" if comm.get_world_size() > 1 else "")
            + ": "
            + ", ".join(f"{name}={value}" for name, value in losses.items())
            + f"; {self._last_good()}"
        )

    def check_weights(self) -> None:
        """Check that the last update left all weights finite; its loss was computed before it.

        Raises:
            NonFiniteLoss: a parameter is NaN or infinite, on any process.
        """
        if all(comm.all_gather(self._weights_are_finite())):
            return
        raise NonFiniteLoss(
            f"weights became NaN or infinite at iteration {self.iter}, so they are not saved; "
            f"{self._last_good()}"
        )

    def _weights_are_finite(self) -> bool:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return not parameters or bool(torch.stack([p.isfinite().all() for p in parameters]).all())

    def _last_good(self) -> str:
        last = self.last_checkpoint() if self.last_checkpoint else ""
        known = f"last good checkpoint: {last}" if last else "there is no checkpoint yet"
        return f"{known}. {_REMEDY}"

    def _reset_clocks(self) -> None:
        self._data_seconds = self._step_seconds = 0.0
        self._images = self._steps = 0

    def _write_metrics(self, losses: dict[str, Tensor], scalars: StepScalars) -> None:
        mine = {name: [value] for name, value in losses.items()} | scalars.values
        tensors = [
            torch.as_tensor(value, dtype=torch.float32, device=self.device).reshape(())
            for values in mine.values()
            for value in values
        ]
        flat = iter(torch.stack(tensors).tolist())
        report = {
            "scalars": {k: _mean([next(flat) for _ in v]) for k, v in mine.items()},
            "data_time": self._data_seconds / self._steps,
            "time": self._step_seconds / self._steps,
            "images": self._images / self._step_seconds,
            "memory": peak_memory_mib(self.device),
        }
        self._reset_clocks()
        reports = comm.gather(report)
        if not comm.is_main_process():
            return
        names = dict.fromkeys(name for r in reports for name in r["scalars"])
        for name in names:
            value = _mean([r["scalars"][name] for r in reports if name in r["scalars"]])
            if not isnan(value) or "loss" in name:
                self.storage.put_scalar(name, value, smoothing_hint=scalars.hints.get(name, True))
        # All processes wait for the slowest one.
        self.storage.put_scalar("data_time", max(r["data_time"] for r in reports))
        self.storage.put_scalar("time", max(r["time"] for r in reports))
        self.storage.put_scalar("img_per_sec", sum(r["images"] for r in reports))
        self.storage.put_scalar("peak_memory_mib", max(r["memory"] for r in reports))
