"""Distillation of point affinities from the momentum network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist

from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.projects.point_region_contrast.points import bilinear_weights, cell_centers
from region_pretrain.projects.point_region_contrast.recompute import (
    entries_at_once,
    recomputed_sum,
)


class AffinityVectors(NamedTuple):
    """A network's affinity vectors of a view.

    Attributes:
        vectors: ``(B, h * w, E)`` unit vectors of the map's locations.
        directions: the prototypes of the network's affinity head, or None
            (:meth:`~region_pretrain.projects.point_region_contrast.AffinityHead.directions`).
    """

    vectors: Tensor
    directions: Tensor | None


class AffinityDistillation(nn.Module):
    r"""Cross entropy between affinities of the momentum network (teacher) and the student.

    A place x is visible in the query view and in its partner. The student s sees it in the query
    view, and its affinities with the places y of the key view are trained to match those of the
    teacher t, which sees x in the partner; k is the momentum network's key view:

    .. math:: -\frac{1}{M} \sum_x \sum_y A^t_{xy} \log A^s_{xy}, \qquad
              A^s_{xy} = \mathrm{softmax}_y(\langle s_x, k_y \rangle / \tau_s), \quad
              A^t_{xy} = \mathrm{softmax}_y(\langle t_x, k_y \rangle / \tau_t)

    (arXiv 2202.04639; it follows from the abstract.) The teacher's temperature rises linearly
    during a warm-up. With prototypes, the similarities to them are distilled in the same way, and
    this loss is added; a running mean is subtracted from the teacher's (DINO, arXiv 2104.14294),
    which :meth:`move_center` updates once per step.

    Vectors between the maps' locations are interpolated and not normalised again, so affinities can
    be interpolated from the few between the maps' locations.

    Args:
        cells: number of places y per side of the key view.
        student_temperature: tau_s.
        teacher_temperature: tau_t at the start and after the warm-up.
        warmup: fraction of the training during which tau_t rises.
        prototypes: number of prototypes of the affinity head.
        center_momentum: momentum of the running mean of the teacher's similarities to prototypes.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        cells: int = 56,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        prototypes: int = 0,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        teacher = tuple(teacher_temperature)
        if len(teacher) != 2 or min(student_temperature, *teacher) <= 0:
            raise UserError(
                f"model.distillation.student_temperature={student_temperature} must be one "
                f"positive value and teacher_temperature={list(teacher)} two"
            )
        if cells < 1 or not 0 <= warmup <= 1 or not 0 <= center_momentum <= 1:
            raise UserError(
                f"model.distillation.cells={cells} must be at least 1, and warmup={warmup} and "
                f"center_momentum={center_momentum} in [0, 1]"
            )
        self.cells = cells
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher
        self.warmup = warmup
        self.center_momentum = center_momentum
        # (P + 1,): the teacher's similarities, summed over the step's places, and their number.
        self._sums: Tensor | None = None
        self._spreads: dict[tuple, Tensor] = {}
        if prototypes:
            self.register_buffer("center", torch.zeros(prototypes))

    def temperature_at(self, progress: float) -> float:
        """tau_t when a fraction of the training is done."""
        start, end = self.teacher_temperature
        return end if progress >= self.warmup else start + (end - start) * progress / self.warmup

    def forward(
        self,
        student: AffinityVectors,
        teacher: AffinityVectors,
        key: Tensor,
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        map_size: tuple[int, int],
        progress: float,
    ) -> tuple[Tensor, int]:
        """Sum the loss over this process's places.

        Args:
            student: the student's vectors of the query view.
            teacher: the momentum network's vectors of the partner; receive no gradient.
            key: ``(B, h * w, E)``, the momentum network's vectors of the key view.
            places: ``(B, M, h * w)`` weights of the places x in the query view's map and in the
                partner's (:func:`bilinear_weights`).
            valid: ``(B, M)`` bool on the CPU.
            map_size: ``(h, w)``.
            progress: fraction of the training done.

        Returns:
            The sum over the valid places (0, connected to the graph, if there are none), and their
            number.
        """
        device = key.device
        mine, count = to_device(valid, device), int(valid.sum())
        spread = self._spread(map_size, key)
        temperatures = self.student_temperature, self.temperature_at(progress)
        with torch.autocast(device.type, enabled=False):
            rows = [
                (network.vectors @ key.transpose(1, 2), spread)
                for network in (student, teacher._replace(vectors=teacher.vectors.detach()))
            ]  # (B, h * w, h * w)
            loss = self._distil(rows, places, mine, temperatures)
            if student.directions is not None:
                loss = loss + self._distil_prototypes(student, teacher, places, mine, temperatures)
                if self.training:
                    self._add_similarities(teacher, places[1], mine, count)
        return loss, count

    def affinities(
        self,
        student: AffinityVectors,
        teacher: AffinityVectors,
        key: Tensor,
        places: tuple[Tensor, Tensor],
        map_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """``A^s`` and ``A^t``, ``(B, M, cells, cells)``, both at the student's temperature.

        Arguments are those of :meth:`forward`.
        """
        spread = self._spread(map_size, key)
        student_maps, teacher_maps = (
            ((weights @ (network.vectors @ key.transpose(1, 2))) @ spread)
            .div(self.student_temperature)
            .softmax(dim=2)
            .unflatten(2, (self.cells, self.cells))
            for network, weights in zip((student, teacher), places, strict=True)
        )
        return student_maps, teacher_maps

    def _spread(self, map_size: tuple[int, int], like: Tensor) -> Tensor:
        """Weights of a map's locations in each place y, ``(h * w, cells * cells)``."""
        known = map_size, like.device, like.dtype
        if known not in self._spreads:
            unit = (self.cells, self.cells)
            centers = cell_centers(self.cells, unit)
            weights = bilinear_weights(centers, unit, map_size).T.contiguous().to(like.dtype)
            self._spreads[known] = to_device(weights, like.device)
        return self._spreads[known]

    def _distil(
        self,
        rows: list[tuple[Tensor, Tensor]],
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        temperatures: tuple[float, float],
        center: Tensor | float = 0.0,
    ) -> Tensor:
        """Sum the cross entropies of student and teacher over all valid places.

        Args:
            rows: for student and teacher ``(B, h * w, r)`` and ``(r, R)``. Their product,
                interpolated to the places, is the logits; the teacher's receive no gradient.
            places, valid: as in :meth:`forward`.
            temperatures: of student and teacher.
            center: subtracted from the teacher's logits.
        """

        def part(images: slice) -> Tensor:
            student, teacher = (
                (weights[images] @ left[images]) @ right / temperature
                for weights, (left, right), temperature in zip(
                    places, rows, temperatures, strict=True
                )
            )  # (b, M, R)
            target = (teacher - center / temperatures[1]).detach().softmax(dim=2)
            entropy = -(target * student.log_softmax(dim=2)).sum(dim=2)
            return (entropy * valid[images]).sum()

        images, count = valid.shape
        per_image = max(count, 1) * rows[0][1].shape[1]
        return recomputed_sum(part, images, entries_at_once(valid.device) // per_image)

    def _distil_prototypes(
        self,
        student: AffinityVectors,
        teacher: AffinityVectors,
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        temperatures: tuple[float, float],
    ) -> Tensor:
        rows = [
            (student.vectors, student.directions.T),
            (teacher.vectors.detach(), teacher.directions.detach().T),
        ]
        return self._distil(rows, places, valid, temperatures, self.center)

    @torch.no_grad()
    def _add_similarities(
        self, teacher: AffinityVectors, places: Tensor, valid: Tensor, count: int
    ) -> None:
        total = torch.einsum("bm,bmp,bpe->e", valid.to(places.dtype), places, teacher.vectors)
        sums = torch.cat([teacher.directions @ total, total.new_full((1,), count)])
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def move_center(self) -> None:
        """Move the center towards the mean of the teacher's similarities to the prototypes.

        The mean is over the places of all micro-batches and processes since the last call; a
        collective call.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        mean = sums[:-1] / sums[-1].clamp(min=1)
        # Without any place there is no mean to move towards.
        step = (1 - self.center_momentum) * sums[-1].clamp(max=1)
        self.center.lerp_(mean, step)
