"""MoCo v2's meta-architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.errors import UserError
from region_pretrain.modeling.losses import embedding_std, info_nce
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.region_head import add_head, as_module
from region_pretrain.modeling.shuffle import ShufflingBatchNorm
from region_pretrain.modeling.trunk import prepare_map, read_map


@META_ARCH_REGISTRY.register()
class MoCo(PretrainingModel):
    """Momentum contrast of whole images, the baseline of the region-level methods.

    The query of one crop is trained to match the key that the momentum network computes of the
    other crop, against a queue of other images' keys.

    Args:
        backbone: the detector's backbone, or its :class:`~region_pretrain.modeling.trunk.Trunk`.
        feature: name of the map that is averaged over space.
        res5: the last stage of a C4 detector, or its blocks, applied to the map.
        head: from the channels of the averaged map to D.
        queue: keys of other images.
        momentum: schedule of the EMA momentum over the run, a function of its progress in [0, 1].
        temperature: temperature of the loss.
        shuffle: use batch norm over groups of images in the trunk, with the key network's images
            shuffled over the groups of all processes. False keeps the detector's own norms, which
            should be SyncBN.
        norm_batch_size: images of such a group, at most; None: all of a process. 32 are those of a
            GPU in the released recipes.
        seed: seed of the shuffling.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: the temperature is not positive, or the backbone has no such map.
    """

    detector_modules: tuple[str, ...] = ("backbone",)

    def __init__(
        self,
        *,
        backbone: nn.Module,
        feature: str,
        res5: nn.Module | Sequence[nn.Module] | None = None,
        head: nn.Module,
        queue: KeyQueue,
        momentum: ParamScheduler,
        temperature: float = 0.2,
        shuffle: bool = True,
        norm_batch_size: int | None = 32,
        seed: int | None = 0,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"model.temperature={temperature} must be positive")
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.shuffling = ShufflingBatchNorm(shuffle, seed, norm_batch_size)
        self.backbone = self.shuffling.prepare(backbone)
        self.feature = feature
        prepare_map(self.backbone, feature)
        if res5 is not None:
            add_head(self, "roi_heads.res5", self.shuffling.prepare(as_module(res5)))
            self.detector_modules = ("backbone", "roi_heads")
        self.head = head
        self.key = MomentumCopy(self.query)
        queue.check_head(head, "model.queue")
        self.queue = queue
        self.momentum = momentum
        self.temperature = temperature
        self.iteration = 0

    @property
    def query(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        modules = {"backbone": self.backbone, "head": self.head}
        if len(self.detector_modules) > 1:
            modules["res5"] = self.roi_heads.res5
        return modules

    def before_step(self, iteration: int, max_iter: int) -> None:
        """Update the key network."""
        self.iteration = iteration
        self.key.ema_update(self.momentum(iteration / max_iter))

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Contrast the first view of each image with the second.

        Args:
            batch: from :class:`~region_pretrain.data.two_crops.TwoCrops`.

        Returns:
            ``loss_image`` (InfoNCE) and ``embedding_std``.
        """
        query_view, key_view = batch.views
        query = self._embed(self.query, query_view)
        with torch.no_grad():
            key = self._keys(key_view)
        losses = info_nce(query, key, self.queue.negatives(), self.temperature)
        outputs = {"loss_image": losses.mean(), "embedding_std": embedding_std(key)}
        if self.training:
            self.queue.enqueue(key)
        return outputs

    def _keys(self, view: View) -> Tensor:
        """``(B, D)`` unit vectors of the key view."""
        permutation = self.shuffling.permutation(len(view.images), self.iteration)
        return permutation.unshuffle(self._embed(self.key, permutation.shuffle_view(view)))

    def _embed(self, network: Mapping[str, nn.Module], view: View) -> Tensor:
        features = read_map(network, self.preprocess(view), self.feature)
        return F.normalize(network["head"](features.mean(dim=(2, 3))).float(), dim=1)
