"""MCL's loss of one pyramid level, and the choice of its target levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from region_pretrain.errors import UserError
from region_pretrain.projects.mcl.contrast import Contrast, gathered_info_nce

PAIRINGS = ("top", "same", "adjacent", "all")


def target_levels(pairing: str | Sequence[Sequence[int]], levels: int) -> list[list[int]]:
    """Find the target levels that each online level is compared with (method figure, a to d).

    Args:
        pairing: ``"top"``: the first, coarsest level for all (a; as released); ``"same"``: the same
            level (b); ``"adjacent"``: the same level and its neighbours (c); ``"all"``: all levels
            (d); or a list of target levels for each online level.
        levels: number of levels.

    Returns:
        For each online level its target levels, from 0, ascending.

    Raises:
        UserError: the pairing is unknown, or names levels that do not exist.
    """
    everything = range(levels)
    if pairing == "top":
        return [[0] for _ in everything]
    if pairing == "same":
        return [[i] for i in everything]
    if pairing == "adjacent":
        return [[j for j in everything if abs(i - j) <= 1] for i in everything]
    if pairing == "all":
        return [list(everything) for _ in everything]
    if not isinstance(pairing, str):
        pairs = [sorted(set(targets)) for targets in pairing]
        if len(pairs) == levels and all(p and set(p) <= set(everything) for p in pairs):
            return pairs
    raise UserError(
        f"model.pairing={pairing}: must be one of {', '.join(PAIRINGS)}, or for each of the "
        f"{levels} levels a list of target levels in 0 to {levels - 1}"
    )


def image_keys(vectors: Tensor, images: Tensor, batch: int) -> Tensor:
    """Compute one key per image: the normalised mean of its tiles' unit vectors.

    Args:
        vectors: ``(slots, D)``.
        images: ``(slots,)`` image index of each slot; each image occurs at least once.
        batch: number of images.

    Returns:
        ``(batch, D)`` unit vectors in the order of the images.
    """
    units = F.normalize(vectors.float(), dim=1)
    sums = units.new_zeros(batch, units.shape[1]).index_add_(0, images, units)
    return F.normalize(sums, dim=1)


def level_contrast(
    queries: Tensor,
    keys: Mapping[int, Tensor],
    positives: Tensor,
    levels: Sequence[int],
    tau: float,
) -> Contrast:
    r"""Compute :math:`2 \tau` times the InfoNCE of one online level, averaged over target levels.

    Args:
        queries: ``(slots, D)`` predictions of one pyramid, not normalised.
        keys: target level -> ``(M, D)`` unit vectors of the images of all processes.
        positives: ``(slots,)`` global image index of each query.
        levels: the target levels.
        tau: temperature; the factor :math:`2 \tau` makes the gradient's scale independent of it.

    Returns:
        Loss and mean cosines.
    """
    queries = F.normalize(queries.float(), dim=1)
    terms = [gathered_info_nce(queries, keys[j], positives, tau) for j in levels]
    loss, positive, negative = (torch.stack(t).mean() for t in zip(*terms, strict=True))
    return Contrast(2 * tau * loss, positive, negative)
