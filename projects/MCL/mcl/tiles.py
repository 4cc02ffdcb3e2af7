"""From views to one vector a tile: what the self-supervised and the supervised method share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps, pyramid_names
from region_pretrain.projects.mcl.montage import SHRINKS, Montage, cut_windows

COMPUTE = ("all", "windows", "maps")


@dataclass
class Canvases:
    """The montages of one pyramid.

    Attributes:
        pixels: ``(T, 3, S, S)`` normalised, level after level.
        counts: canvases of each level; their sum is T.
        images: for each level ``(slots,)`` int64, the image in each tile, on the pixels' device.
    """

    pixels: Tensor
    counts: list[int]
    images: list[Tensor]

    def of_levels(self, levels: Sequence[int]) -> Tensor:
        """``(T', 3, S, S)``: the canvases of some levels."""
        if len(levels) == len(self.counts):
            return self.pixels
        parts = self.pixels.split(self.counts)
        return torch.cat([parts[i] for i in levels]) if len(levels) > 1 else parts[levels[0]]


def _spans(counts: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


class TileModel(PretrainingModel):
    """A detector's backbone and box head on montages; base class of the meta-architectures.

    A level's tiles fill windows of the detector's own pooling size (7 x 7) on the map whose stride
    is ``size / ratio / 7``, so cutting the map takes RoIAlign's place. The head pads each window
    with zeros: only backbone and FPN see across the borders of tiles.

    Modules keep the detector's names (``backbone.*``, ``roi_heads.box_head.*``). The output
    convolutions of FPN levels that no ratio reads are not trained.

    Args:
        backbone: the detector's; or only its bottom-up part, with ``neck``.
        pooler: the detector's box pooler, for the size of its output.
        head: the detector's box head, its convolutions or all of it. Maps are averaged over space.
        montage: see :class:`~region_pretrain.projects.mcl.montage.Montage`.
        neck: :class:`~region_pretrain.projects.mcl.pseudo_levels.PseudoLevels` where the backbone
            alone is pre-trained; the checkpoint's detector part is then ``backbone.bottom_up``.
        compute: ``"all"``: every map of every canvas, the head on all its windows, the levels that
            the target needs and those that it does not, as released. Batch norms see all of it;
            nearly all windows are thrown away. ``"windows"``: all maps of the canvases that are
            used, the head on the windows that are. ``"maps"``: each map only of the canvases whose
            tiles are on it, as well.
        pixel_mean, pixel_std, input_format: the detector's.

    Raises:
        UserError: tiles that do not fit the maps or the head, another ``compute``.
    """

    detector_modules: tuple[str, ...] = ("backbone", "roi_heads")

    def __init__(
        self,
        *,
        backbone: Backbone,
        pooler: ROIPooler,
        head: nn.Module,
        montage: Montage,
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
        if neck is not None:
            self.backbone = nn.ModuleDict({"bottom_up": backbone})  # its name in an FPN detector
            self.neck = neck
            self.detector_modules = ("backbone",)
        self.roi_heads = nn.ModuleDict({"box_pooler": pooler, "box_head": head})
        self.montage = montage
        self.compute = compute
        self.window = pooler.output_size[0]
        self.names = _level_names(neck if neck is not None else backbone, montage, self.window)
        freeze_unread(backbone, self.names)
        # Into the checkpoint: weights from aliased and from averaged tiles are not the same thing.
        self.register_buffer("shrink_filter", torch.tensor(SHRINKS.index(montage.shrink)))

    @property
    def trunk(self) -> dict[str, nn.Module]:
        """What turns canvases into features, by role."""
        modules = {"backbone": self.backbone, "head": self.roi_heads["box_head"]}
        if hasattr(self, "neck"):
            modules |= {"backbone": self.backbone["bottom_up"], "neck": self.neck}
        return modules

    def pyramids(self, batch: ViewBatch) -> list[Canvases]:
        """Montages of the query and of the key views of a batch, each with a draw of its own.

        Raises:
            UserError: the number or the size of the views is not the montage's.
        """
        levels, views, size = len(self.names), batch.views, self.montage.size
        found = [tuple(view.images.shape[-2:]) for view in views]
        if found != [(size, size)] * (2 * levels):
            raise UserError(
                f"the model's montage has {levels} ratios at {size} pixels and wants 2 x {levels} "
                f"such views; the data has {found}: let model.montage be "
                "${dataloader.train.dataset.views.montage}"
            )
        pyramids = [views[i : i + levels] for i in range(0, len(views), levels)]
        return [self._canvases(pyramid) for pyramid in pyramids]

    @torch.no_grad()
    def _canvases(self, views: Sequence[View]) -> Canvases:
        pixels = [self.preprocess(view) for view in views]
        drawn = self.montage.draw(len(pixels[0]))
        flat = torch.cat(drawn).to(pixels[0].device, non_blocking=True)  # one copy for all levels
        images = list(flat.split([len(slots) for slots in drawn]))
        return Canvases(self.montage.canvases(pixels, images), self.montage.counts(drawn), images)

    def tile_vectors(
        self,
        network: Mapping[str, nn.Module],
        canvases: Canvases,
        levels: Sequence[int],
        embed: Callable[[Tensor], Tensor],
    ) -> dict[int, Tensor]:
        """One vector a tile.

        Args:
            network: of :attr:`trunk`, or its copy.
            canvases: of one pyramid.
            levels: those that are wanted, ascending.
            embed: ``(n, C)`` pooled features of the head to ``(n, D)``. It is called for each level
                apart, as the head is; what their batch norms see is up to ``compute``.

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
    """The map of each ratio: that on which a tile is ``window`` feature pixels wide."""
    names = pyramid_names(shapes)
    strides = {shapes.output_shape()[name].stride: name for name in names}
    found = []
    for ratio in montage.ratios:
        stride = montage.size / ratio / window
        if stride not in strides:
            raise UserError(
                f"montage.size={montage.size} with ratio {ratio} gives tiles of "
                f"{montage.size // ratio} pixels: to be {window} wide on a map they need stride "
                f"{stride:g}, and the backbone's maps have {sorted(strides)}"
            )
        found.append(strides[stride])
    return found
