"""The contrast of points; the four levels of the paper's figure 2 are settings of this loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_gather
from torch import Tensor, nn

from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import gather_rows
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.point_region_contrast.recompute import (
    entries_at_once,
    recomputed_sum,
)

OTHERS = ("none", "local", "gathered", "queue")
LOGS = ("outside", "inside")
_NEVER = -1e4  # a logit with no weight in a softmax; finite, so that it causes no NaN


class Points(NamedTuple):
    """Points of one view of each image of a batch.

    Attributes:
        vectors: ``(B, S, D)`` features, not normalised.
        ids: ``(B, S)`` int64 on the CPU; points of an image with equal ids are positives.
        valid: ``(B, S)`` bool on the CPU.
    """

    vectors: Tensor
    ids: Tensor
    valid: Tensor


class PointContrast(nn.Module):
    r"""Contrast of points with those of the same region, other regions and other images.

    With unit vectors :math:`f_a` of the query view's points, :math:`g_c` of the key view's, and P
    the points of the key view with the id of a,

    .. math:: \ell_a = -\frac{1}{|P|} \sum_{p \in P}
              \log \frac{e^{\langle f_a, g_p \rangle / \tau}}
                        {\sum_{c \in C} e^{\langle f_a, g_c \rangle / \tau}}

    where C consists of P, the image's other points (``in_image``) and those of other images
    (``others``). The loss is averaged over all points that have a positive. (Point-level region
    contrast, arXiv 2202.04639; the equation follows from the abstract and figure 2.)

    Args:
        temperature: tau.
        in_image: use points of the image's other regions as negatives.
        others: points of other images to use as negatives: ``"none"``, ``"local"`` (this process's
            batch), ``"gathered"`` (all processes' batches) or ``"queue"`` (earlier batches).
        pool: number of consecutive points to average first. With all points of a region this is the
            contrast of regions.
        log: ``"outside"`` as above; ``"inside"``: the negative log of the positives' summed
            probability.
        same_view: use points of the query view as positives and negatives as well.
        queue_length, dim: size of the queue of ``others="queue"``.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        in_image: bool = True,
        others: str = "local",
        pool: int = 1,
        log: str = "outside",
        same_view: bool = False,
        queue_length: int = 65_536,
        dim: int = 128,
    ) -> None:
        super().__init__()
        for name, value, known in (("others", others, OTHERS), ("log", log, LOGS)):
            if value not in known:
                raise UserError(
                    f"model.contrast.{name}={value!r} must be one of {', '.join(known)}"
                )
        if temperature <= 0 or pool < 1:
            raise UserError(
                f"model.contrast.temperature={temperature} must be positive and pool={pool} at "
                "least 1"
            )
        if others == "none" and not in_image:
            raise UserError("model.contrast.in_image=False with others=none leaves no negatives")
        self.temperature = temperature
        self.in_image, self.others = in_image, others
        self.pool = pool
        self.log, self.same_view = log, same_view
        self.queue = KeyQueue(queue_length, dim) if others == "queue" else None
        if self.queue is not None:
            self.queue.of_images = False

    def forward(self, query: Points, key: Points) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the loss over this process's points.

        Args:
            query: points of the query view.
            key: points of the key view; receive no gradient. ``gathered`` and ``queue`` need the
                same number of slots on every process.

        Returns:
            The sum over the query view's points that have a positive (0, connected to the graph, if
            none has), their number, and the mean cosine of positives (0 if there are none): scalars
            on the vectors' device.
        """
        query, key = self._pooled(query), self._pooled(key._replace(vectors=key.vectors.detach()))
        device = key.vectors.device
        bank, bank_ids, bank_valid = key
        if self.same_view:
            bank = torch.cat([bank, query.vectors], dim=1)
            bank_ids = torch.cat([bank_ids, query.ids], dim=1)
            bank_valid = torch.cat([bank_valid, query.valid], dim=1)
        positive = query.ids[:, :, None] == bank_ids[:, None]
        positive &= query.valid[:, :, None] & bank_valid[:, None]  # (B, S, S')
        slots = query.ids.shape[1]
        candidate = positive
        if self.in_image:
            candidate = bank_valid[:, None] & query.valid[:, :, None]
        if self.same_view:  # a point is neither its own positive nor its own negative
            itself = torch.eye(slots, dtype=torch.bool, device=device)
            positive[:, :, -slots:] &= ~itself
            candidate[:, :, -slots:] &= ~itself
        anchors = positive.any(dim=2)
        own = positive, candidate, anchors
        others = self._others(bank, bank_valid)

        def part(images: slice) -> Tensor:
            return self._loss(images, query.vectors, bank, *own, *others)

        columns = bank.shape[1] + len(others[0])
        step = entries_at_once(device) // max(slots * columns, 1)
        with torch.autocast(device.type, enabled=False):
            loss = recomputed_sum(part, len(bank), step)
            with torch.no_grad():
                cosine = torch.einsum("bid,bjd->bij", query.vectors, bank)
                similarity = (cosine * positive).sum() / positive.sum().clamp(min=1)
        if self.queue is not None and self.training:
            self.queue.enqueue(key.vectors.flatten(0, 1), key.valid.flatten())
        return loss, anchors.sum(), similarity

    def _pooled(self, points: Points) -> Points:
        """Unit vectors, one per group of ``pool`` points, with ids and validity on their device."""
        vectors, ids, valid = points.vectors.float(), points.ids, points.valid
        if self.pool > 1:
            if ids.shape[1] % self.pool:
                raise UserError(
                    f"model.contrast.pool={self.pool} does not divide the {ids.shape[1]} points "
                    "of a view: set it to dataloader.train.dataset.views.points"
                )
            vectors = vectors.unflatten(1, (-1, self.pool)).mean(dim=2)
            ids, valid = (t.unflatten(1, (-1, self.pool)) for t in (ids, valid))
            if (ids != ids[..., :1]).any():
                raise UserError(
                    f"model.contrast.pool={self.pool} averages points with different ids: set it "
                    "to dataloader.train.dataset.views.points, with views.positives=region"
                )
            ids, valid = ids[..., 0], valid.all(dim=2)
        ids, valid = (to_device(t, vectors.device) for t in (ids, valid))
        return Points(F.normalize(vectors, dim=2), ids, valid)

    def _others(self, bank: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """``(M, D)`` vectors of other images' points, and ``(M,)`` the image each belongs to.

        Images are numbered within this process; -1 is an image of another process or an earlier
        batch, -2 an empty slot.
        """
        images, slots = valid.shape
        device = bank.device
        if self.others == "none":
            return bank.new_zeros(0, bank.shape[2]), torch.zeros(
                0, dtype=torch.int64, device=device
            )
        if self.queue is not None:
            negatives = self.queue.negatives()
            return negatives, torch.full((len(negatives),), -1, device=device)
        image = torch.arange(images, device=device)[:, None].expand(-1, slots)
        image = torch.where(valid, image, -2).flatten()
        vectors = bank.flatten(0, 1)
        if self.others == "gathered" and comm.get_world_size() > 1:
            offset = comm.get_rank() * images
            # Number images over all processes, then relative to this one.
            everywhere = gather_rows(torch.where(image < 0, image, image + offset))
            mine = (everywhere >= offset) & (everywhere < offset + images)
            image = torch.where(mine, everywhere - offset, everywhere.clamp(max=-1))
            # With `same_view` these include other processes' query points, which need gradients.
            vectors = torch.cat(differentiable_all_gather(vectors))
        return vectors, image

    def _loss(
        self,
        images: slice,
        query: Tensor,
        bank: Tensor,
        positive: Tensor,
        candidate: Tensor,
        anchors: Tensor,
        others: Tensor,
        image_of_other: Tensor,
    ) -> Tensor:
        """Sum over the anchors of a slice of images; shapes as in :meth:`forward`."""
        query, positive, anchors = query[images], positive[images], anchors[images]
        own = torch.einsum("bid,bjd->bij", query, bank[images]) / self.temperature
        far = query @ others.T / self.temperature  # (b, S, M)
        image = torch.arange(images.start, images.stop, device=far.device)
        banned = (image_of_other == image[:, None]) | (image_of_other == -2)  # (b, M)
        logits = torch.cat(
            [
                own.masked_fill(~candidate[images], _NEVER),
                far.masked_fill(banned[:, None], _NEVER),
            ],
            dim=2,
        )
        if self.log == "inside":
            found = own.masked_fill(~positive, _NEVER).logsumexp(dim=2)
        else:
            found = (own * positive).sum(dim=2) / positive.sum(dim=2).clamp(min=1)
        return ((logits.logsumexp(dim=2) - found) * anchors).sum()
