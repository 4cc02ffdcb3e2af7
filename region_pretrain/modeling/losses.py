"""Losses between matched regions."""

from __future__ import annotations

import torch
from torch import Tensor


def matches(ids_a: Tensor, ids_b: Tensor, valid_a: Tensor, valid_b: Tensor) -> Tensor:
    """Which slots of two views contain the same region.

    Args:
        ids_a, ids_b: ``(B, Ka)`` and ``(B, Kb)`` region ids.
        valid_a, valid_b: the same shapes, bool; an invalid slot matches nothing.

    Returns:
        ``(B, Ka, Kb)`` bool.
    """
    same = ids_a[:, :, None] == ids_b[:, None, :]
    return same & valid_a[:, :, None] & valid_b[:, None, :]


def matched_cosine_loss(prediction: Tensor, target: Tensor, match: Tensor) -> Tensor:
    r"""Negative cosine of matched regions, each image with equal weight.

    .. math:: -2 \, \frac{1}{B} \sum_b \frac{\sum_{ij} M_{bij} \langle p_{bi}, z_{bj} \rangle}
              {\sum_{ij} M_{bij} + 10^{-6}}

    which is BYOL's normalised squared error up to a constant. Images without a match add 0.

    Args:
        prediction: ``(B, Ka, D)`` unit vectors of the online network.
        target: ``(B, Kb, D)`` unit vectors of the target network; receives no gradient.
        match: ``(B, Ka, Kb)`` bool.

    Returns:
        Scalar in [-2, 2].
    """
    with torch.autocast(prediction.device.type, enabled=False):  # bfloat16 has only 3 digits
        cosine = torch.einsum("bid,bjd->bij", prediction, target.detach())
    match = match.to(cosine.dtype)
    per_image = (match * cosine).sum(dim=(1, 2)) / (match.sum(dim=(1, 2)) + 1e-6)
    return -2 * per_image.mean()


@torch.no_grad()
def embedding_std(embeddings: Tensor) -> Tensor:
    """Standard deviation of unit vectors, averaged over channels, times sqrt(D).

    Args:
        embeddings: ``(..., D)`` unit vectors.

    Returns:
        Scalar: about 1 if they are spread over the sphere, 0 if all are the same (collapse).
    """
    flat = embeddings.detach().float().flatten(0, -2)
    return flat.std(dim=0).mean() * flat.shape[1] ** 0.5


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    r"""InfoNCE of each query: its own positive key against negatives shared by all queries.

    .. math:: \ell_i = -\log \frac{e^{\langle q_i, k_i \rangle / \tau}}
              {e^{\langle q_i, k_i \rangle / \tau} + \sum_n e^{\langle q_i, n \rangle / \tau}}

    (MoCo, arXiv 1911.05722, equation 1.)

    Args:
        query: ``(N, D)`` unit vectors; N may be 0.
        positive: ``(N, D)`` unit vectors; receives no gradient.
        negatives: ``(M, D)`` unit vectors; receive no gradient.
        temperature: tau.

    Returns:
        ``(N,)`` losses.
    """
    with torch.autocast(query.device.type, enabled=False):
        query = query.float() if query.dtype != torch.float64 else query
        own = (query * positive.detach().to(query.dtype)).sum(dim=1, keepdim=True)  # (N, 1)
        others = query @ negatives.detach().to(query.dtype).T  # (N, M)
        logits = torch.cat([own, others], dim=1) / temperature
        return logits.logsumexp(dim=1) - logits[:, 0]
