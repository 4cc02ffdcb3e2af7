"""Supervised MCL: the same montages, with labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.projects.mcl.tiles import TileModel


@META_ARCH_REGISTRY.register()
class SupervisedMCL(TileModel):
    """Each tile, at every scale, is classified into its image's class.

    All levels share one linear classifier, so a class is represented alike on each. There is no
    target network.

    Args:
        classifier: maps the head's features to class logits.
        parts: see :class:`~region_pretrain.projects.mcl.tiles.TileModel`.
    """

    def __init__(self, *, classifier: nn.Linear, **parts) -> None:
        super().__init__(**parts)
        self.classifier = classifier

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute the losses of a labelled :class:`~region_pretrain.projects.mcl.MCLViews` batch.

        Returns:
            For each level ``loss_p5``, its weight times the mean cross entropy of the two pyramids,
            and ``accuracy_p5``, the fraction of correctly classified tiles.

        Raises:
            UserError: the batch has no labels, or labels outside the classifier's range.
        """
        classes = self.classifier.out_features
        if batch.labels is None:
            raise UserError(
                "SupervisedMCL needs labels: set dataloader.train.dataset.labels=True and a "
                "labelled data set"
            )
        wrong = batch.labels[(batch.labels < 0) | (batch.labels >= classes)].tolist()
        if wrong:
            raise UserError(
                f"class {wrong[0]} in the data, but model.classifier.out_features={classes}: set "
                "it to the number of classes (numbered from 0)"
            )
        pyramids = self.pyramids(batch)
        labels = to_device(batch.labels, pyramids[0].pixels.device)
        levels = range(len(self.names))
        losses: list[list[Tensor]] = [[] for _ in levels]
        hits: list[list[Tensor]] = [[] for _ in levels]
        for canvases in pyramids:
            logits = self.tile_vectors(self.trunk, canvases, levels, self._classify)
            for i in levels:
                truth = labels[canvases.images[i]]
                losses[i].append(F.cross_entropy(logits[i], truth))
                hits[i].append((logits[i].argmax(dim=1) == truth).float().mean())
        outputs: dict[str, Tensor] = {}
        for name, weight, loss, hit in zip(
            self.names, self.level_weights, losses, hits, strict=True
        ):
            outputs[f"loss_{name}"] = weight * torch.stack(loss).mean()
            outputs[f"accuracy_{name}"] = torch.stack(hit).mean()
        return outputs

    def _classify(self, features: Tensor) -> Tensor:
        """``(n, classes)`` float32 logits: bfloat16 would choose among the nearest at random."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float())
