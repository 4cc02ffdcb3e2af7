"""Hooks that Detectron2 does not have."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from omegaconf import DictConfig
from torch import nn

from region_pretrain.engine.checkpoint import FINAL, RunCheckpointer, checkpoint_name
from region_pretrain.engine.kernels import without_cudnn_benchmark
from region_pretrain.engine.processes import on_main_process
from region_pretrain.engine.tracker import TrackerWriter
from region_pretrain.engine.writer_list import build_writers
from region_pretrain.errors import Stopped, UserError, describe
from region_pretrain.metrics import Results, newest_iteration
from region_pretrain.modeling.given import training_modes_kept
from region_pretrain.random_state import random_state_kept

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Saves numbered checkpoints during a run, and ``model_final.pth`` at its end.

    Register it after all hooks that change what is trained or draw random numbers: a checkpoint
    then includes their effects, and a resumed run's random state is set after they have started.
    Only :class:`EvaluationHook`, :class:`MetricsHook` and :class:`StopTogether`, which do neither,
    come after it.

    Args:
        checkpointer: writes and deletes the files.
        period: save every this many iterations; 0 disables this.
        max_to_keep: number of newest numbered files to keep; None keeps all. After the last
            iteration, one is left, which stands in for ``model_final.pth`` if that gets damaged.
        minutes: save at the first log step this many minutes after the last save; 0 disables this.
        keep_every: save every this many iterations and keep these files; 0 disables this.
        stop: called after each step on all ranks; True saves and ends the run with ``Stopped``.
        refresh_period: also save every this many iterations, before the regions are refreshed; 0
            disables this.

    Attributes:
        stopped: whether it has ended the run, on all ranks.

    Raises:
        UserError: ``max_to_keep`` is less than 1.
    """

    def __init__(
        self,
        checkpointer: RunCheckpointer,
        period: int = 0,
        max_to_keep: int | None = None,
        minutes: float = 0,
        keep_every: int = 0,
        stop: Callable[[], bool] = lambda: False,
        refresh_period: int = 0,
    ) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise UserError(
                f"train.checkpointer.max_to_keep={max_to_keep}: must be at least 1, or null to "
                "keep all checkpoints"
            )
        self.checkpointer = checkpointer
        self.period = period
        self.max_to_keep = max_to_keep
        self.minutes = minutes
        self.keep_every = keep_every
        self.stop = stop
        self.refresh_period = refresh_period
        self.stopped = False
        self._saved_at = time.monotonic()

    def before_train(self) -> None:
        self._saved_at = time.monotonic()
        self.checkpointer.restore_random_state()

    def after_step(self) -> None:
        iteration = self.trainer.iter
        last = iteration == self.trainer.max_iter - 1
        stopping = self.stop()
        if not last and not stopping and not self._is_due(iteration + 1):
            return
        self.trainer.check_finite()
        self.trainer.check_weights()
        self.checkpointer.save(FINAL if last else checkpoint_name(iteration), iteration=iteration)
        kept = 1 if last and self.max_to_keep is not None else self.max_to_keep
        self.checkpointer.remove_old(kept, self.keep_every)
        self._saved_at = time.monotonic()
        if stopping and not last:
            logger.warning(
                "stopped on request: saved after iteration %d; --resume continues the run",
                iteration,
            )
            self.stopped = True
            raise Stopped

    def _is_due(self, done: int) -> bool:
        periods = self.period, self.keep_every, self.refresh_period
        if any(period and done % period == 0 for period in periods):
            return True
        if not self.minutes or not self.trainer.is_log_step():
            return False
        # The main process's clock decides for all ranks.
        return comm.all_gather(time.monotonic() - self._saved_at >= 60 * self.minutes)[0]


@contextmanager
def no_side_effects(model: nn.Module) -> Iterator[None]:
    """Restore random states, and which modules are in training mode, after the context.

    Within it, cuDNN takes images of any shape (:func:`without_cudnn_benchmark`).
    """
    # Detectron2 leaves modules in eval mode after an error.
    with random_state_kept(), without_cudnn_benchmark(), training_modes_kept(model):
        yield


class StopTogether(HookBase):
    """The last hook: the ranks of a run that was stopped exit once all have saved and written.

    The first one that exits makes the launcher terminate the others.
    """

    def __init__(self, checkpoints: CheckpointHook) -> None:
        self._checkpoints = checkpoints

    def after_train(self) -> None:
        if self._checkpoints.stopped:
            comm.synchronize()


class EvaluationHook(HookBase):
    """Evaluates the model during a run and at its end, without any effect on the training.

    An evaluation that raises an exception is reported, and the training continues. One that is
    missing from ``metrics.json`` because the run was killed after the checkpoint of the same step
    is made when the run resumes.

    Args:
        period: evaluate every this many iterations and after the last one; 0: only after the last.
        evaluate: model without DDP -> results, on the main process; fails on all processes
            together (see :func:`~region_pretrain.engine.processes.fail_together`).
        output_dir: the run's folder.
        last_checkpoint: returns the path of the newest checkpoint, or "".

    Attributes:
        results: results of the newest evaluation; empty if it failed.
        error: the exception of the newest evaluation, as text; "" if it succeeded.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[nn.Module], Results],
        output_dir: str,
        last_checkpoint: Callable[[], str],
    ) -> None:
        self.period = period
        self.results: Results = {}
        self.error = ""
        self._evaluate = evaluate
        self._output_dir = output_dir
        self._last_checkpoint = last_checkpoint

    def is_due(self, done: int) -> bool:
        """Whether the model is evaluated after ``done`` iterations, before the last one."""
        return self.period > 0 and done % self.period == 0 and 0 < done < self.trainer.max_iter

    def before_train(self) -> None:
        done = self.trainer.start_iter
        if self.is_due(done) and on_main_process(
            lambda: newest_iteration(self._output_dir, before=done) < done - 1
        ):
            logger.info("the evaluation after iteration %d is missing: evaluating now", done - 1)
            self._run(done - 1)

    def after_step(self) -> None:
        if self.is_due(self.trainer.iter + 1):
            self._run(self.trainer.iter)

    def after_train(self) -> None:
        # All processes would wait for one whose last step failed.
        if self.trainer.iter >= self.trainer.max_iter:
            self._run(self.trainer.max_iter)

    def _run(self, iteration: int) -> None:
        self.results, self.error = {}, ""
        with no_side_effects(self.trainer.model):
            try:
                self.results = self._evaluate(self.trainer.module)
            except Exception as error:
                self.error = describe(error)
                logger.debug("traceback of the failed evaluation:", exc_info=True)
        for name, value in flatten_results_dict(self.results).items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False, cur_iter=iteration)
        if self.error and iteration < self.trainer.max_iter and comm.is_main_process():
            logger.error(
                "the evaluation after iteration %d failed: %s. The training continues; newest "
                "checkpoint: %s. The traceback is in %s",
                iteration,
                self.error,
                self._last_checkpoint() or "none yet",
                os.path.join(self._output_dir, "log.txt"),
            )


class MetricsHook(HookBase):
    """Writes a run's metrics at log steps and after evaluations; register it last.

    A checkpoint contains the newest metrics, so that what had not been written when a run was
    killed is written when it resumes.

    Args:
        cfg: the run's config; ``train`` contains the writers, the output folder and the log period.
        evaluation: its results are written at once.
        saved: returns the path of the checkpoint that this process has written last, or "".
    """

    def __init__(
        self,
        cfg: DictConfig,
        evaluation: EvaluationHook | None = None,
        saved: Callable[[], str] = str,
    ) -> None:
        self._cfg = cfg
        self._output_dir = cfg.train.output_dir
        self._log_period = cfg.train.log_period
        self._evaluation = evaluation
        self._saved = saved
        self._recorded = ""
        self._writers: list[EventWriter] = []
        self._restored: dict[str, tuple[float, int, bool]] = {}

    def state_dict(self) -> dict[str, Any]:
        hints = self.trainer.storage.smoothing_hints()
        latest = self.trainer.storage.latest()
        return {"metrics": {name: (*entry, hints[name]) for name, entry in latest.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["metrics"]

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        done = self.trainer.start_iter
        self._writers = build_writers(self._cfg, done, self.trainer.max_iter)
        if not done:
            return
        written, storage = newest_iteration(self._output_dir, before=done), self.trainer.storage
        for name, (value, iteration, hint) in self._restored.items():
            if iteration > written and name not in storage.latest():
                storage.put_scalar(name, value, smoothing_hint=hint, cur_iter=iteration)
        self._write(done)

    def after_step(self) -> None:
        path = self._saved()
        if path != self._recorded:
            self._recorded = path
            for writer in self._writers:
                if isinstance(writer, TrackerWriter):
                    writer.write_checkpoint(path)
        self._write(self.trainer.iter + 1)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._write(self.trainer.max_iter)
        # A run that was interrupted writes what is left when it resumes.
        for writer in self._writers:
            writer.close()

    def _write(self, done: int) -> None:
        is_last = done == self.trainer.max_iter
        evaluated = self._evaluation is not None and self._evaluation.is_due(done)
        if is_last or evaluated or done % self._log_period == 0:
            for writer in self._writers:
                writer.write()
            # All processes have them, but only TensorBoard's writer removes them.
            self.trainer.storage.clear_images()
            self.trainer.storage.clear_histograms()


class CollapseWarning(HookBase):
    """Warns when all embeddings become the same, which the loss alone does not show.

    Models report ``<name>embedding_std``: the standard deviation over a batch of the L2-normalised
    embeddings, averaged over dimensions, times sqrt(dimension). 1 means spread over the sphere,
    0 collapsed.

    Args:
        threshold: lower values count as collapsing.
        patience: number of consecutive log periods below the threshold after which to warn, each
            time.
    """

    def __init__(self, threshold: float = 0.1, patience: int = 3) -> None:
        self.threshold = threshold
        self.patience = patience
        self._low: dict[str, int] = {}

    def after_step(self) -> None:
        if not self.trainer.is_log_step():
            return
        for name, (value, iteration) in self.trainer.storage.latest().items():
            if not name.endswith("embedding_std") or iteration != self.trainer.iter:
                continue
            self._low[name] = self._low.get(name, 0) + 1 if value < self.threshold else 0
            if self._low[name] and self._low[name] % self.patience == 0:
                logger.warning(
                    "%s is %.3f (1 = spread, 0 = all embeddings the same) and has been below %g "
                    "for %d log periods: the representation is collapsing. Lower optimizer.lr or "
                    "lengthen its warm-up, raise the target network's momentum or the batch size, "
                    "and check that no gradient reaches the target network",
                    name,
                    value,
                    self.threshold,
                    self._low[name],
                )
