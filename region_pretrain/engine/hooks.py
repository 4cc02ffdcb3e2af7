"""Hooks that Detectron2 does not have."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from detectron2.engine import HookBase
from detectron2.utils import comm

from region_pretrain.engine.checkpoint import FINAL, RunCheckpointer, checkpoint_name
from region_pretrain.errors import Stopped

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Saves numbered checkpoints during a run, and ``model_final.pth`` at its end.

    Register it last: a checkpoint then includes the effects of evaluation and precise batch norm,
    and a resumed run's random state is set after all other hooks have started.

    Args:
        checkpointer: writes and deletes the files.
        period: save every this many iterations; 0 disables this.
        minutes: save at the first log step this many minutes after the last save; 0 disables this.
        keep_last: number of newest numbered files to keep; 0 keeps all.
        keep_every: save every this many iterations and keep these files; 0 disables this.
        stop: called after each step on all ranks; True saves and ends the run with ``Stopped``.
    """

    def __init__(
        self,
        checkpointer: RunCheckpointer,
        period: int = 0,
        minutes: float = 0,
        keep_last: int = 0,
        keep_every: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.checkpointer = checkpointer
        self.period = period
        self.minutes = minutes
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.stop = stop
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
        self.checkpointer.save(FINAL if last else checkpoint_name(iteration), iteration=iteration)
        self.checkpointer.remove_old(self.keep_last, self.keep_every)
        self._saved_at = time.monotonic()
        if stopping and not last:
            logger.warning("stopping on request: saved after iteration %d", iteration)
            raise Stopped

    def _is_due(self, done: int) -> bool:
        if any(period and done % period == 0 for period in (self.period, self.keep_every)):
            return True
        if not self.minutes or not self.trainer.is_log_step():
            return False
        # The main process's clock decides for all ranks.
        return comm.all_gather(time.monotonic() - self._saved_at >= 60 * self.minutes)[0]


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
