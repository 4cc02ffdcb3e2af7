"""From views to one vector per tile: what self-supervised and supervised MCL share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.device import to_device
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps, pyramid_names
from region_pretrain.modeling.region_head import add_head
from region_pretrain.projects.mcl.montage import SHRINKS, Montage, cut_windows

COMPUTE = ("all", "windows", "maps")


@dataclass
class Canvases:
    """The montages of one pyramid.

    Attributes:
        pixels: ``(T, 3, S, S)`` normalised, level after level.
        counts: number of canvases of each level; their sum is T.
        images: for each level ``(slots,)`` int64 image index of each tile, on the pixels' device.
    """

    pixels: Tensor
    counts: list[int]
    images: list[Tensor]

    def of_levels(self, levels: Sequence[int]) -> Tensor:
        """The canvases of the given levels, ``(T', 3, S, S)``."""
        if len(levels) == len(self.counts):
            return self.pixels
        parts = self.pixels.split(self.counts)
        return torch.cat([parts[i] for i in levels]) if len(levels) > 1 else parts[levels[0]]


def _spans(counts: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


class TileModel(PretrainingModel):
    """A detector's backbone and head on montages; base class of the meta-architectures.

    A level's tiles fill windows of the detector's pooling size (7 x 7) on the map with stride
    ``size / ratio / 7``, so cutting the map into windows replaces RoIAlign. The head zero-pads each
    window: only backbone and FPN see across the borders of tiles.

    Modules keep the detector's names (``backbone.*``, ``roi_heads.box_head.*``). The output
    convolutions of levels without tiles are not trained.

    Args:
        backbone: the detector's backbone, or with ``neck`` only its trunk.
        pooler: the detector's box pooler, for its output size.
        head: the detector's head for pooled regions, complete or its convolutions only. If it
            returns maps, they are averaged over space.
        head_name: name of the head in the detector, e.g. ``roi_heads.box_head``.
        montage: see :class:`~region_pretrain.projects.mcl.montage.Montage`.
        level_weights: loss weight of each ratio, coarse levels first.
        neck: :class:`~region_pretrain.projects.mcl.pseudo_levels.PseudoLevels` to pre-train the
            trunk alone.
        compute: ``"all"``: as released, online and target networks compute every map of every
            canvas and run the head on all windows, nearly all of which are discarded; batch norms
            see all of them. ``"windows"``: all maps of the canvases in use, the head only on the
            windows in use. ``"maps"``: also, each map only for the canvases with tiles on it.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: the tiles do not fit the maps or the head, the weights do not fit the ratios, or
            ``compute`` is unknown.
    """

    detector_modules: tuple[str, ...] = ("backbone", "roi_heads")

    def __init__(
        self,
        *,
        backbone: nn.Module,
        pooler: ROIPooler,
        head: nn.Module,
        head_name: str = "roi_heads.box_head",
        montage: Montage,
        level_weights: Sequence[float] = (1 / 2, 1 / 4, 1 / 8, 1 / 8),
        neck: nn.Module | None = None,
        compute: str = "windows",
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        if compute not in COMPUTE:
            raise UserError(f"model.compute={compute}: must be one of {', '.join(COMPUTE)}")
        self.preprocess = Preprocess(pixel_mean, pixel_std, input_format)
        self.backbone = backbone
        self.detector_modules = ("backbone", head_name.partition(".")[0])
        if neck is not None:
            self.neck = neck
            self.detector_modules = ("backbone",)
        add_head(self, "roi_heads.box_pooler", pooler)
        add_head(self, head_name, head)
        self.head_name = head_name
        self.montage = montage
        self.compute = compute
        self.window = pooler.output_size[0]
        self.names = _level_names(neck if neck is not None else backbone, montage, self.window)
        freeze_unread(backbone, self.names if neck is None else [neck.in_feature])
        # Into the checkpoint: weights from aliased and from averaged tiles are not the same thing.
        self.register_buffer("shrink_filter", torch.tensor(SHRINKS.index(montage.shrink)))
        if len(level_weights) != len(self.names):
            raise UserError(
                f"model.level_weights={list(level_weights)} must have one weight for each of the "
                f"{len(self.names)} montage.ratios"
            )
        self.level_weights = list(level_weights)

    @property
    def trunk(self) -> dict[str, nn.Module]:
        """The modules that map canvases to features, by role."""
        modules = {"backbone": self.backbone, "head": self.get_submodule(self.head_name)}
        return modules | ({"neck": self.neck} if hasattr(self, "neck") else {})

    def pyramids(self, batch: ViewBatch) -> list[Canvases]:
        """Create the montages of the query and the key views, with independent random layouts.

        Raises:
            UserError: number or size of the views does not match the montage.
        """
        levels, views, size = len(self.names), batch.views, self.montage.size
        found = [tuple(view.images.shape[-2:]) for view in views]
        if found != [(size, size)] * (2 * levels):
            raise UserError(
                f"the model's montage has {levels} ratios at {size} pixels and needs 2 x {levels} "
                f"such views, but the data has {found}: set model.montage to "
                "${dataloader.train.dataset.views.montage}"
            )
        pyramids = [views[i : i + levels] for i in range(0, len(views), levels)]
        return [self._canvases(pyramid) for pyramid in pyramids]

    @torch.no_grad()
    def _canvases(self, views: Sequence[View]) -> Canvases:
        pixels = self.preprocess.together(views)
        drawn = self.montage.draw(len(pixels[0]))
        flat = to_device(torch.cat(drawn), pixels[0].device)  # one copy for all levels
        images = list(flat.split([len(slots) for slots in drawn]))
        return Canvases(self.montage.canvases(pixels, images), self.montage.counts(drawn), images)

    def tile_vectors(
        self,
        network: Mapping[str, nn.Module],
        canvases: Canvases,
        levels: Sequence[int],
        embed: Callable[[Tensor], Tensor],
    ) -> dict[int, Tensor]:
        """Compute one vector per tile.

        Args:
            network: :attr:`trunk` or its momentum copy.
            canvases: the montages of one pyramid.
            levels: the levels to compute, ascending.
            embed: maps the head's ``(n, C)`` features to ``(n, D)``. Like the head, it is called
                once per level; ``compute`` determines what their batch norms see.

        Returns:
            For each of ``levels`` ``(slots, D)``, in slot order.
        """
        everything = self.compute == "all"
        computed = list(range(len(self.names))) if everything else levels
        pixels = canvases.of_levels(computed)
        spans = _spans([canvases.counts[i] for i in computed])
        whole = slice(0, len(pixels))
        reads = {
            self.names[i]: span if self.compute == "maps" else whole
            for i, span in zip(computed, spans, strict=True)
        }
        maps = self._maps(network, pixels, reads)
        vectors: dict[int, Tensor] = {}
        for i, span in zip(computed, spans, strict=True):
            features = maps[self.names[i]]
            if self.compute == "windows":
                features = features[span]
            found = embed(self._head(network, cut_windows(features, self.window)))
            if everything:  # (T * n * n, D): keep this level's canvases
                found = found.unflatten(0, (len(pixels), -1))[span].flatten(0, 1)
            vectors[i] = found
        return {i: vectors[i] for i in levels}

    @staticmethod
    def _maps(
        network: Mapping[str, nn.Module], pixels: Tensor, reads: Mapping[str, slice]
    ) -> dict[str, Tensor]:
        if "neck" in network:
            return network["neck"](network["backbone"](pixels), reads)
        return pyramid_maps(network["backbone"], pixels, reads)

    @staticmethod
    def _head(network: Mapping[str, nn.Module], windows: Tensor) -> Tensor:
        features = network["head"](windows)
        return features.mean(dim=(2, 3)) if features.dim() == 4 else features


def _level_names(shapes: nn.Module, montage: Montage, window: int) -> list[str]:
    """The map of each ratio: the one on which a tile is ``window`` feature pixels wide."""
    names = pyramid_names(shapes)
    strides = {shapes.output_shape()[name].stride: name for name in names}
    found = []
    for ratio in montage.ratios:
        stride = montage.size / ratio / window
        if stride not in strides:
            raise UserError(
                f"montage.size={montage.size} with ratio {ratio} gives tiles of "
                f"{montage.size // ratio} pixels: to be {window} feature pixels wide they need "
                f"a map with stride {stride:g}, but the backbone's strides are {sorted(strides)}"
            )
        found.append(strides[stride])
    return found
