"""How far a positive may be from its region, and how this grows during training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist

from region_pretrain.errors import UserError


class Difficulty(NamedTuple):
    """How candidates are drawn, and which of them are valid.

    Attributes:
        center: full range of the centre's shift, in widths and heights of the box.
        log_size: full range of the logarithm of a side's scaling.
        iou_floor: minimum IoU of a valid candidate with the region.
    """

    center: float
    log_size: float
    iou_floor: float


class Feedback(NamedTuple):
    """Closed-loop control: difficulty rises while positives are too similar, and falls otherwise.

    Every ``period`` steps the level changes by ``gain * (similarity - set_point)``, where the
    similarity is averaged over the positives chosen since the last change.

    Attributes:
        set_point: target cosine similarity of query and positive, in [-1, 1].
        gain: change of the level, which is in [0, 1], per unit of similarity.
        period: steps between changes; each change synchronises with the device.
    """

    set_point: float = 0.8
    gain: float = 0.1
    period: int = 10


class Curriculum(nn.Module):
    """The spatial-noise curriculum of CCOP (released code; arXiv 2111.13651).

    A level in [0, 1] interpolates noise ranges and IoU floor between their two ends. Open-loop, as
    released, the level is the fraction of training done; with ``feedback`` the similarity of the
    positives controls it. The state is part of the model's state dict.

    Args:
        center, log_size, iou_floor: the fields of :class:`Difficulty` at level 0 and at level 1.
        feedback: closed-loop control; None for the open loop.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        center: tuple[float, float] = (0.15, 0.6),
        log_size: tuple[float, float] = (0.35, 1.4),
        iou_floor: tuple[float, float] = (0.8, 0.4),
        feedback: Feedback | None = None,
    ) -> None:
        super().__init__()
        ends = {"center": center, "log_size": log_size, "iou_floor": iou_floor}
        for name, values in ends.items():
            high = 1.0 if name == "iou_floor" else float("inf")
            if len(values) != 2 or any(not 0 <= value <= high for value in values):
                raise UserError(
                    f"curriculum.{name}={list(values)} must be two values in [0, {high:g}], for "
                    "the start and the end of training"
                )
        if feedback is not None and (
            feedback.period < 1 or feedback.gain < 0 or not -1 <= feedback.set_point <= 1
        ):
            raise UserError(
                f"curriculum.feedback={feedback} needs set_point in [-1, 1], gain >= 0 and "
                "period >= 1"
            )
        self._ends = [tuple(map(float, values)) for values in ends.values()]
        self.feedback = feedback
        self.level = 0.0
        self.iteration = 0
        # Sum of the positives' similarities since the last change of the level, and their number.
        self.register_buffer("measured", torch.zeros(2, dtype=torch.float64))

    def at(self, level: float) -> Difficulty:
        """The difficulty at a level, clamped to [0, 1]."""
        level = min(max(level, 0.0), 1.0)
        return Difficulty(*(start + (end - start) * level for start, end in self._ends))

    @property
    def difficulty(self) -> Difficulty:
        """The difficulty of the current step."""
        return self.at(self.level)

    def step(self, iteration: int, max_iter: int) -> Difficulty:
        """Begin a step.

        Args:
            iteration: number of the iteration, from 0. As in the released code, the first step is
                at level ``1 / max_iter`` and the last at 1.
            max_iter: number of iterations of the run.
        """
        self.iteration = iteration
        if self.feedback is None:
            self.level = min((iteration + 1) / max_iter, 1.0)
        elif iteration and iteration % self.feedback.period == 0:
            total, count = self.measured.tolist()
            self.measured.zero_()
            if count:
                move = self.feedback.gain * (total / count - self.feedback.set_point)
                self.level = min(max(self.level + move, 0.0), 1.0)
        return self.difficulty

    @torch.no_grad()
    def measure(self, similarity: Tensor) -> None:
        """Record the similarities of the step's positives; a collective call.

        Args:
            similarity: ``(R,)``; R may differ between processes, and may be 0.
        """
        if self.feedback is not None:
            total = similarity.double().sum()
            mine = torch.stack([total, torch.full_like(total, len(similarity))])
            if comm.get_world_size() > 1:
                dist.all_reduce(mine)
            self.measured += mine

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.level, self.iteration], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.level, self.iteration = float(state[0]), int(state[1])
