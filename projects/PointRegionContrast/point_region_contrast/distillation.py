"""Distillation of point affinities: a soft split of the image, from its momentum copy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist

from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import mean_over_ranks
from region_pretrain.modeling.heads import DeepMLPHead
from region_pretrain.modeling.points import bilinear_weights, cell_centres
from region_pretrain.modeling.recompute import recomputed_sum

#: Numbers of a softmax at a time; some tensors of this size are there while the loss is worked out.
_AT_ONCE = 1 << 22


class AffinityHead(nn.Module):
    """From a feature to the unit vector whose affinities are distilled.

    Args:
        input_dim: channels of the feature.
        hidden_dim: of two hidden layers.
        output_dim: of the vector.
        norm: of the hidden layers, for :func:`detectron2.layers.get_norm`.
        prototypes: directions that a vector is compared with, for a second distribution to distil;
            0: none.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 2048,
        output_dim: int = 256,
        norm: str = "SyncBN",
        prototypes: int = 0,
    ) -> None:
        super().__init__()
        self.mlp = DeepMLPHead([input_dim, hidden_dim, hidden_dim, output_dim], norm, init_std=0.02)
        self.prototypes = None
        if prototypes:
            self.prototypes = nn.Parameter(torch.empty(prototypes, output_dim))
            nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """``(N, C)`` to ``(N, output_dim)`` unit vectors, float32."""
        return F.normalize(self.mlp(features).float(), dim=1)

    def directions(self) -> Tensor | None:
        """``(prototypes, output_dim)``, of length 1; None where there are none."""
        return None if self.prototypes is None else F.normalize(self.prototypes, dim=1)


class Described(NamedTuple):
    """What a network says of a view.

    Attributes:
        vectors: ``(B, h * w, E)`` unit vectors of the places of its map.
        directions: of its :class:`AffinityHead`.
    """

    vectors: Tensor
    directions: Tensor | None


class AffinityDistillation(nn.Module):
    r"""Cross entropy of affinities, the momentum copy's against the student's.

    A place x is in the query view and in its partner. How like it is to each place y of the key
    view, as the momentum copy k has it from the partner, the student s shall say of the query view:

    .. math:: -\frac{1}{M} \sum_x \sum_y A^t_{xy} \log A^s_{xy}, \qquad
              A^s_{xy} = \mathrm{softmax}_y(\langle s_x, k_y \rangle / \tau_s), \quad
              A^t_{xy} = \mathrm{softmax}_y(\langle t_x, k_y \rangle / \tau_t)

    (arXiv 2202.04639; read out of its abstract.) The teacher's temperature rises linearly during
    the first part of the training. With prototypes, a vector's likeness to them is distilled in the
    same way, the teacher's less a running mean (DINO, arXiv 2104.14294), and added.

    Places between those of the maps are interpolated and not normalised again, so their affinities
    are interpolated from those of the maps' places, which are few.

    Args:
        cells: a side, of the places y of the key view.
        student_temperature: tau_s.
        teacher_temperature: tau_t at the beginning, and after the warm-up.
        warmup: part of the training during which it rises.
        prototypes: as many as the head has.
        centre_momentum: of the running mean of the teacher's likeness to prototypes.

    Raises:
        UserError: a value that makes no sense.
    """

    def __init__(
        self,
        cells: int = 56,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        prototypes: int = 0,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        teacher = tuple(teacher_temperature)
        if len(teacher) != 2 or min(student_temperature, *teacher) <= 0:
            raise UserError(
                f"model.distillation: student_temperature={student_temperature} and "
                f"teacher_temperature={list(teacher)}: one above 0, and two of them"
            )
        if cells < 1 or not 0 <= warmup <= 1 or not 0 <= centre_momentum <= 1:
            raise UserError(
                f"model.distillation: cells={cells}, warmup={warmup} and "
                f"centre_momentum={centre_momentum}: at least 1, and two shares within [0, 1]"
            )
        self.cells = cells
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher
        self.warmup = warmup
        self.centre_momentum = centre_momentum
        if prototypes:
            self.register_buffer("centre", torch.zeros(prototypes))

    def temperature_at(self, done: float) -> float:
        """tau_t when a share of the training is done."""
        start, end = self.teacher_temperature
        return end if done >= self.warmup else start + (end - start) * done / self.warmup

    def forward(
        self,
        student: Described,
        teacher: Described,
        key: Tensor,
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        map_size: tuple[int, int],
        done: float,
    ) -> tuple[Tensor, int]:
        """The loss of this process's places, and of how many.

        Args:
            student: the query view, by the student.
            teacher: the partner, by the momentum copy; gets no gradient.
            key: ``(B, h * w, E)`` vectors of the key view, by the momentum copy.
            places: ``(B, M, h * w)`` weights of x in the query view's map and the partner's
                (:func:`~region_pretrain.modeling.points.bilinear_weights`).
            valid: ``(B, M)`` bool on the CPU.
            map_size: ``(h, w)``.
            done: share of the training.

        Returns:
            Sum over the valid places; 0, connected to the graph, where there is none. Their number.
        """
        device = key.device
        mine, count = valid.to(device, non_blocking=True), int(valid.sum())
        spread = self._spread(map_size).to(device, non_blocking=True)
        temperatures = self.student_temperature, self.temperature_at(done)
        with torch.autocast(device.type, enabled=False):
            rows = [
                (described.vectors @ key.transpose(1, 2), spread)
                for described in (student, teacher._replace(vectors=teacher.vectors.detach()))
            ]  # (B, h * w, h * w)
            loss = self._distil(rows, places, mine, temperatures)
            if student.directions is not None:
                loss = loss + self._distil_prototypes(student, teacher, places, mine, temperatures)
                if self.training:
                    self._move_centre(teacher, places[1], mine, count)
        return loss, count

    def affinities(
        self,
        student: Described,
        teacher: Described,
        key: Tensor,
        places: tuple[Tensor, Tensor],
        map_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """``A^s`` and ``A^t``, ``(B, M, cells, cells)``; arguments as in :meth:`forward`.

        Both at the student's temperature, so that they can be compared.
        """
        spread = self._spread(map_size).to(key.device)
        student_maps, teacher_maps = (
            ((weights @ (described.vectors @ key.transpose(1, 2))) @ spread)
            .div(self.student_temperature)
            .softmax(dim=2)
            .unflatten(2, (self.cells, self.cells))
            for described, weights in zip((student, teacher), places, strict=True)
        )
        return student_maps, teacher_maps

    def _spread(self, map_size: tuple[int, int]) -> Tensor:
        """``(h * w, cells * cells)``: weights of a map's places in each y."""
        unit = (self.cells, self.cells)
        return bilinear_weights(cell_centres(self.cells, unit), unit, map_size).T.contiguous()

    def _distil(
        self,
        rows: list[tuple[Tensor, Tensor]],
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        temperatures: tuple[float, float],
        centre: Tensor | float = 0.0,
    ) -> Tensor:
        """Sum of the cross entropies of student and teacher over all valid places.

        Args:
            rows: for either ``(B, h * w, r)`` and ``(r, R)``, whose product, interpolated to the
                places, are the logits; those of the teacher get no gradient.
            places, valid, temperatures: as in :meth:`forward`, student first.
            centre: taken from the teacher's logits.
        """

        def part(images: slice) -> Tensor:
            student, teacher = (
                (weights[images] @ left[images]) @ right / temperature
                for weights, (left, right), temperature in zip(
                    places, rows, temperatures, strict=True
                )
            )  # (b, M, R)
            target = (teacher - centre / temperatures[1]).detach().softmax(dim=2)
            entropy = -(target * student.log_softmax(dim=2)).sum(dim=2)
            return (entropy * valid[images]).sum()

        images, count = valid.shape
        return recomputed_sum(part, images, _AT_ONCE // (max(count, 1) * rows[0][1].shape[1]))

    def _distil_prototypes(
        self,
        student: Described,
        teacher: Described,
        places: tuple[Tensor, Tensor],
        valid: Tensor,
        temperatures: tuple[float, float],
    ) -> Tensor:
        rows = [
            (student.vectors, student.directions.T),
            (teacher.vectors.detach(), teacher.directions.detach().T),
        ]
        # A copy: the loss is recomputed for its gradient, after the centre has moved.
        return self._distil(rows, places, valid, temperatures, self.centre.clone())

    @torch.no_grad()
    def _move_centre(self, teacher: Described, places: Tensor, valid: Tensor, count: int) -> None:
        """Towards the mean of the teacher's likenesses over all processes' places."""
        total = torch.einsum("bm,bmp,bpe->e", valid.to(places.dtype), places, teacher.vectors)
        mean = mean_over_ranks(total, count)
        if comm.get_world_size() > 1:
            dist.all_reduce(mean)
            mean = mean / comm.get_world_size()
        self.centre.lerp_(teacher.directions @ mean, 1 - self.centre_momentum)
