"""MCL's meta-architecture."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from region_pretrain.data.batch import ViewBatch
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import gather_rows
from region_pretrain.modeling.losses import embedding_std
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.projects.mcl.loss import image_keys, level_contrast, target_levels
from region_pretrain.projects.mcl.tiles import Canvases, TileModel


@META_ARCH_REGISTRY.register()
class MCL(TileModel):
    """Each tile, at every scale, predicts the target embedding of its image at full size.

    Each batch is arranged into two pyramids of montages (query and key). Each tile of one pyramid
    must identify its image among the target network's embeddings of the other pyramid's images,
    gathered from all processes.

    Args:
        projector: maps the head's features to embeddings.
        predictor: maps embeddings to predictions of the target's. Each level has its own copy, with
            weights from a normal distribution with standard deviation 0.01.
        momentum: schedule of the EMA momentum over the run, from 0 to 1.
        temperature: temperature of the softmax over images.
        pairing: the target levels that each level is compared with
            (:func:`~region_pretrain.projects.mcl.loss.target_levels`).
        parts: see :class:`~region_pretrain.projects.mcl.tiles.TileModel`.

    Raises:
        UserError: pairing or projector do not fit the levels or the head.
    """

    def __init__(
        self,
        *,
        projector: nn.Module,
        predictor: nn.Module,
        momentum: ParamScheduler,
        temperature: float = 1.0,
        pairing: str | Sequence[Sequence[int]] = "top",
        **parts,
    ) -> None:
        super().__init__(**parts)
        levels = len(self.names)
        if temperature <= 0:
            raise UserError(f"model.temperature={temperature}: must be above 0")
        _check_width(self.trunk["head"], projector)
        self.projector = projector
        self.predictors = nn.ModuleList(copy.deepcopy(predictor) for _ in range(levels))
        for module in self.predictors.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        self.target = MomentumCopy(self.online)
        self.momentum = momentum
        self.temperature = temperature
        self.pairs = target_levels(pairing, levels)

    @property
    def online(self) -> dict[str, nn.Module]:
        """The modules that have a momentum copy."""
        return {**self.trunk, "projector": self.projector}

    def after_step(self, iteration: int, max_iter: int) -> None:
        """Update the target network."""
        momentum = self.momentum(iteration / max_iter)
        self.target.ema_update(momentum)
        get_event_storage().put_scalar("target_momentum", momentum, smoothing_hint=False)

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Compute the losses of a batch from :class:`~region_pretrain.projects.mcl.MCLViews`.

        Returns:
            For each level, named after its map: ``loss_p5``, weighted and symmetric, and the mean
            cosines ``positive_query_p5``, ``negative_query_p5``, ``positive_key_p5`` and
            ``negative_key_p5``. And ``embedding_std`` of the key pyramid's targets.
        """
        query, key = pyramids = self.pyramids(batch)
        online = [self._predict(canvases) for canvases in pyramids]
        query_keys, key_keys = (self._keys(canvases, len(batch)) for canvases in pyramids)
        offset = comm.get_rank() * len(batch)
        outputs: dict[str, Tensor] = {}
        for i, name in enumerate(self.names):
            outputs[f"loss_{name}"] = 0.0
            # Queries of either pyramid are compared with the targets of the other.
            for side, canvases, queries, keys in (
                ("query", query, online[0], key_keys),
                ("key", key, online[1], query_keys),
            ):
                positives = canvases.images[i] + offset
                term = level_contrast(queries[i], keys, positives, self.pairs[i], self.temperature)
                outputs[f"loss_{name}"] += self.level_weights[i] * term.loss
                outputs[f"positive_{side}_{name}"] = term.positive
                outputs[f"negative_{side}_{name}"] = term.negative
        outputs["embedding_std"] = embedding_std(next(iter(key_keys.values())))
        return outputs

    def _predict(self, canvases: Canvases) -> list[Tensor]:
        """The online network's ``(slots, D)`` predictions for each level."""
        levels = range(len(self.names))
        vectors = self.tile_vectors(self.online, canvases, levels, self.projector)
        return [self.predictors[i](vectors[i]) for i in levels]

    @torch.no_grad()
    def _keys(self, canvases: Canvases, batch: int) -> dict[int, Tensor]:
        """Target level -> ``(batch * world_size, D)`` unit vectors of all images."""
        levels = sorted(set().union(*self.pairs))
        vectors = self.tile_vectors(self.target, canvases, levels, self.target["projector"])
        return {i: gather_rows(image_keys(vectors[i], canvases.images[i], batch)) for i in levels}


def _check_width(head: nn.Module, projector: nn.Module) -> None:
    first = next((m for m in projector.modules() if isinstance(m, nn.Linear)), None)
    shape = getattr(head, "output_shape", None)  # Detectron2's heads have it
    if first is not None and shape is not None and first.in_features != shape.channels:
        raise UserError(
            f"model.projector.input_dim={first.in_features}: must be {shape.channels}, the number "
            "of output channels of the box head"
        )
