"""InfoNCE against keys that are gathered from every process."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Contrast(NamedTuple):
    """Loss and mean cosines of a contrast, all scalars.

    Attributes:
        loss: cross entropy, with gradient to the queries.
        positive: mean cosine of a query and its own key.
        negative: mean cosine of a query and all other keys; 0 if there are none.
    """

    loss: Tensor
    positive: Tensor
    negative: Tensor


def gathered_info_nce(
    queries: Tensor, keys: Tensor, positives: Tensor, temperature: float = 1.0
) -> Contrast:
    r"""Cross entropy of finding each query's key among all keys (InfoNCE, arXiv 1807.03748).

    For keys gathered from all processes with
    :func:`~region_pretrain.modeling.gather.gather_rows`. For separate negatives, such as a queue's,
    see :func:`~region_pretrain.modeling.losses.info_nce`.

    .. math:: -\frac{1}{n} \sum_i \log \frac{\exp(\langle q_i, k_{y_i} \rangle / \tau)}
              {\sum_{j=1}^{M} \exp(\langle q_i, k_j \rangle / \tau)}

    Args:
        queries: ``(n, D)`` unit vectors.
        keys: ``(M, D)`` unit vectors; receive no gradient.
        positives: ``(n,)`` int64, the index of each query's key; queries may share a key.
        temperature: :math:`\tau`.

    Returns:
        The loss in nats, and the mean cosines.
    """
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 has only 3 digits
        cosine = queries @ keys.detach().T  # (n, M)
        loss = F.cross_entropy(cosine / temperature, positives)
    with torch.no_grad():
        own = cosine.gather(1, positives[:, None]).mean()
        others = (cosine.mean() * len(keys) - own) / max(len(keys) - 1, 1)
    return Contrast(loss, own, others)
