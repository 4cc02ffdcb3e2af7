"""MoCo v2's meta-architecture."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.errors import UserError
from region_pretrain.modeling.losses import embedding_std, info_nce
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.norms import use_local_batchnorm
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.shuffle import ImageShuffle
from region_pretrain.modeling.trunk import Trunk


@META_ARCH_REGISTRY.register()
class MoCo(PretrainingModel):
    """Momentum contrast of whole images, the baseline of the region-level methods.

    The query of one crop must be told from a queue of other images' keys by its nearness to the key
    that the momentum copy gives the other crop.

    Args:
        backbone: the detector's trunk.
        head: from the trunk's channels to D.
        queue: keys of other images.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        temperature: of the loss.
        shuffle: batch norm in the trunk per process, as released, and key images dealt to other
            processes. ``False``: the detector's own norms, which should be SyncBN.
        seed: of the shuffle.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: a temperature that is not positive.
    """

    detector_modules = ("backbone",)

    def __init__(
        self,
        *,
        backbone: Trunk,
        head: nn.Module,
        queue: KeyQueue,
        momentum: ParamScheduler,
        temperature: float = 0.2,
        shuffle: bool = True,
        seed: int | None = 0,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"model.temperature={temperature}: it is more than 0")
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.backbone = use_local_batchnorm(backbone) if shuffle else backbone
        self.head = head
        self.key = MomentumCopy(self.query)
        self.queue = queue
        self.momentum = momentum
        self.temperature = temperature
        self.shuffle = shuffle
        self.seed = seed or 0
        self.iteration = 0

    @property
    def query(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        return {"backbone": self.backbone, "head": self.head}

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Move the key network; the engine calls it before each optimiser step's forward."""
        self.iteration = iteration
        self.key.ema_update(self.momentum(iteration / max_iter))

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """``loss_image``, the InfoNCE of the first view against the second; and ``embedding_std``.

        Args:
            batch: from :class:`~region_pretrain.data.two_crops.TwoCrops`.
        """
        query_view, key_view = batch.views
        query = F.normalize(self.head(self.backbone(self.preprocess(query_view))).float(), dim=1)
        with torch.no_grad():
            key = self._keys(key_view)
        losses = info_nce(query, key, self.queue.negatives(), self.temperature)
        outputs = {"loss_image": losses.mean(), "embedding_std": embedding_std(key)}
        if self.training:
            self.queue.enqueue(key)
        return outputs

    def _keys(self, view: View) -> Tensor:
        """``(B, D)`` unit vectors of the key view, embedded in another order if that is asked."""
        if not self.shuffle or comm.get_world_size() == 1:
            return self._embed_key(view)
        shuffle = ImageShuffle(len(view.images), (self.seed, self.iteration))
        images, photometry = shuffle.deal(view.images), shuffle.deal(view.photometry)
        one = torch.ones(len(images), dtype=torch.int64)
        key = self._embed_key(replace(view, images=images, photometry=photometry))
        return shuffle.collect(key, one, one)

    def _embed_key(self, view: View) -> Tensor:
        images = self.preprocess(view)
        return F.normalize(self.key["head"](self.key["backbone"](images)).float(), dim=1)
