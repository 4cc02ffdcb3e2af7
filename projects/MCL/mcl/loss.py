"""MCL's loss of one level, and which levels it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from region_pretrain.errors import UserError
from region_pretrain.projects.mcl.contrast import Contrast, gathered_info_nce

PAIRINGS = ("top", "same", "adjacent", "all")


def target_levels(pairing: str | Sequence[Sequence[int]], levels: int) -> list[list[int]]:
    """Which target levels each online level is compared with (the method figure, a to d).

    Args:
        pairing: ``"top"`` all with the first, coarsest level (a; as released); ``"same"`` each with
            its own (b); ``"adjacent"`` with its own and its neighbours (c); ``"all"`` with all (d);
            or a list of target levels for each online level.
        levels: how many there are.

    Returns:
        For each online level its target levels, from 0, ascending.

    Raises:
        UserError: no such pairing, or levels that do not exist.
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
    """One key an image: the mean of its tiles' unit vectors, normalised.

    Args:
        vectors: ``(slots, D)``.
        images: ``(slots,)`` image index of each; every image has at least one.
        batch: number of images.

    Returns:
        ``(batch, D)`` unit vectors in the images' order.
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
    r"""``2 tau CE`` of one online level of one pyramid, the mean over its target levels.

    Args:
        queries: ``(slots, D)`` predictions, not normalised.
        keys: for each target level the ``(M, D)`` unit vectors of all images of all processes.
        positives: ``(slots,)`` global image index of each query.
        levels: the target levels.
        tau: temperature. The factor :math:`2 \tau` keeps the gradient's size when it changes.

    Returns:
        Loss and mean cosines.
    """
    queries = F.normalize(queries.float(), dim=1)
    terms = [gathered_info_nce(queries, keys[j], positives, tau) for j in levels]
    loss, positive, negative = (torch.stack(t).mean() for t in zip(*terms, strict=True))
    return Contrast(2 * tau * loss, positive, negative)
