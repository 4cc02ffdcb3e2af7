"""CCOP's loss between the regions of one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ANCHORS = ("column", "row")


def distinct_pairs(boxes: Tensor, valid: Tensor, max_iou: float) -> Tensor:
    """Which pairs of an image's regions hardly overlap.

    Args:
        boxes: ``(B, K, 4)`` XYXY.
        valid: ``(B, K)`` bool.
        max_iou: pairs with an IoU below this are distinct.

    Returns:
        ``(B, K, K)`` bool, symmetric, false on the diagonal.
    """
    lo = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    hi = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    intersection = (hi - lo).clamp(min=0).prod(dim=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    union = area[:, :, None] + area[:, None, :] - intersection
    apart = intersection < max_iou * union  # strict: never of two boxes without area
    pairs = apart & valid[:, :, None] & valid[:, None, :]
    return pairs & ~torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)


def intra_image_margin(
    query: Tensor, key: Tensor, pairs: Tensor, margin: float, anchor: str = "column"
) -> Tensor:
    r"""Sum of the margin violations between regions of the same image.

    With :math:`S_{ij} = \langle q_i, k_j \rangle` of one image's regions,

    .. math:: \sum_{(i, j) \in P} \max(0, S_{ij} - S_{jj} + m)

    as released: key j must be closer to its own query than to query i by the margin. With
    ``anchor="row"``, :math:`S_{ii}` replaces :math:`S_{jj}`: query i must be closer to its own key
    than to key j.

    Args:
        query: ``(B, K, D)`` unit vectors.
        key: ``(B, K, D)`` unit vectors of the same regions; receives no gradient.
        pairs: ``(B, K, K)`` bool, P.
        margin: m.
        anchor: ``"column"`` or ``"row"``.

    Returns:
        Scalar; without pairs 0, connected to the graph.
    """
    with torch.autocast(query.device.type, enabled=False):
        similarity = torch.einsum("bid,bjd->bij", query, key.detach())
    own = similarity.diagonal(dim1=1, dim2=2)  # (B, K)
    own = own[:, None, :] if anchor == "column" else own[:, :, None]
    return (F.relu(similarity - own + margin) * pairs).sum()
