"""MCL's montages, and the vectors of their tiles, for the restatements of both kinds of MCL."""

from __future__ import annotations

from typing import NamedTuple

import torch
from parts import pixels
from torch import Tensor
from torch.nn.functional import conv2d
from training_step import SGD_MOMENTUM, Case, Restatement

from region_pretrain.data.batch import ViewBatch

LARS_LR, WEIGHT_DECAY, TRUST = 2.0, 0.01, 0.001


class Variant(NamedTuple):
    """A configuration of MCL. A tile covers ``window`` x ``window`` pixels of its level's map.

    ``coarsest``: number of the map of ratio 1.
    ``pairing``: the model's argument, and the target levels of each level that it stands for.
    ``optimizer``: ``"sgd"``, or LARS with the ``"default"`` or the ``"released"`` exclusions.
    """

    size: int = 64
    window: int = 2
    coarsest: int = 5
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    images_per_canvas: tuple[int, ...] = (1, 4, 16, 32)
    weights: tuple[float, ...] = (0.5, 0.25, 0.15, 0.1)
    shrink: str = "nearest"
    compute: str = "windows"
    pairing: tuple = ("top", [[0], [0], [0], [0]])
    fc: bool = False
    fpn: bool = True
    channels: str = "RGB"
    optimizer: str = "sgd"
    supervised: bool = False


def shrink(images: Tensor, n: int, how: str) -> Tensor:
    """``(B, 3, S, S)`` to ``(B, 3, S / n, S / n)``."""
    if how == "nearest":
        return images[:, :, ::n, ::n]
    if how == "area":
        return sum(images[:, :, y::n, x::n] for y in range(n) for x in range(n)) / n**2
    side = images.shape[-1]
    weights = torch.zeros(side // n, side, dtype=images.dtype)  # a triangle of 2n pixels
    for i in range(side // n):
        for j in range(side):
            weights[i, j] = max(0.0, 1 - abs((j + 0.5) / n - (i + 0.5)))
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights @ images @ weights.T


def enlarge(maps: Tensor, side: int) -> Tensor:
    """Square maps at a larger size: each pixel is the nearest of the given ones."""
    nearest = [y * maps.shape[-1] // side for y in range(side)]
    return maps[:, :, nearest][:, :, :, nearest]


class SlowTiles(Restatement):
    """Base of the restatements of both kinds of MCL.

    Args:
        processes: number of processes that train. The restatement has one twin, which sees the
            global batch, but tiles each process's part on canvases of its own.
    """

    average_after_step = True

    def __init__(self, case: Case, variant: Variant, processes: int = 1) -> None:
        super().__init__(case)
        self.variant, self.levels = variant, range(len(variant.ratios))
        self.generators = [torch.Generator().manual_seed(rank) for rank in range(processes)]

    def parts(self, twin):
        backbone, head = twin.backbone, twin.roi_heads.box_head
        neck = {} if self.variant.fpn else {"neck": twin.neck}
        return {"backbone": backbone, **neck, "head": head}

    def pyramid(self, batch: ViewBatch, side: int):
        """Query (0) or key (1) pyramid: canvases and the tiles' images, both by level.

        A level has the canvases of the first process, then those of the second. Images are numbered
        by their position in the global batch.
        """
        v, processes = self.variant, len(self.generators)
        canvases, images = [[] for _ in self.levels], [[] for _ in self.levels]
        for rank, mine in enumerate(batch.chunk(processes)):
            for i, (n, per_canvas) in enumerate(zip(v.ratios, v.images_per_canvas, strict=True)):
                seen = mine.views[side * len(v.ratios) + i]
                tiles = shrink(pixels(seen, self.precision.dtype, v.channels), n, v.shrink)
                count, length = -(-len(mine) // per_canvas), v.size // n
                order = torch.arange(count)
                if n > 1:
                    order = torch.randperm(count * n * n, generator=self.generators[rank])
                canvas = torch.zeros(count, 3, v.size, v.size, dtype=self.precision.dtype)
                for slot, number in enumerate(order.tolist()):
                    k, row, column = slot // n**2, slot % n**2 // n, slot % n
                    y, x, image = row * length, column * length, number % len(mine)
                    canvas[k, :, y : y + length, x : x + length] = tiles[image]
                    images[i].append(rank * len(mine) + image)
                canvases[i].append(canvas)
        return [torch.cat(of_level) for of_level in canvases], images

    def maps(self, network, x: Tensor, owner: list[int], computed: list[int]):
        """Level -> (map, the indices of its canvases in ``x``); ``owner``: each canvas's level."""
        v, level_of = self.variant, {self.variant.coarsest - i: i for i in self.levels}

        def read(p: int, t: int) -> bool:
            if v.compute == "maps":
                return level_of.get(p) == owner[t]
            return level_of.get(p) in computed

        canvases, found = range(len(owner)), {}
        if not v.fpn:
            layer = network["neck"].reduce
            coarse = conv2d(network["backbone"](x)["res5"], layer.weight)
            coarse = layer.norm(coarse).clamp(min=0)
            for i in computed:
                rows = [t for t in canvases if read(5 - i, t)]
                found[i] = enlarge(coarse[rows], 2**i * coarse.shape[-1]), rows
            return found
        fpn, above, before = network["backbone"], None, []
        bottom_up = fpn.bottom_up(x)
        for p in (5, 4, 3, 2):  # a layer sees the canvases whose map here, or a finer one, is read
            rows = [t for t in canvases if any(read(q, t) for q in range(2, p + 1))]
            if not rows:
                break
            here = getattr(fpn, f"fpn_lateral{p}")(bottom_up[f"res{p}"][rows])
            if above is not None:
                above = above[[before.index(t) for t in rows]]
                here = here + enlarge(above, here.shape[-1])
            above, before, out = here, rows, [t for t in rows if read(p, t)]
            if out:
                layer = getattr(fpn, f"fpn_output{p}")
                found[level_of[p]] = layer(here[[rows.index(t) for t in out]]), out
        return found

    def tile_vectors(self, network, canvases: list[Tensor], levels: list[int], embed):
        """For each level one vector per tile, in the order of the slots."""
        everything, w = self.variant.compute == "all", self.variant.window
        computed = list(self.levels) if everything else levels
        owner = [i for i in computed for _ in canvases[i]]
        x = torch.cat([canvases[i] for i in computed])
        maps = self.call(lambda x: self.maps(network, x, owner, computed), x)
        vectors = {}
        for i in computed:
            features, rows = maps[i]
            if not everything:
                mine = [k for k, t in enumerate(rows) if owner[t] == i]
                features, rows = features[mine], [rows[k] for k in mine]
            corners = range(0, features.shape[-1], w)
            windows = [
                f[:, r : r + w, c : c + w] for f in features for r in corners for c in corners
            ]
            owners = [owner[t] for t in rows for _ in range(len(corners) ** 2)]
            y = self.call(network["head"], torch.stack(windows))
            y = self.call(embed, y if self.variant.fc else y.mean(dim=(2, 3)))
            vectors[i] = y[[k for k, of_level in enumerate(owners) if of_level == i]]
        return {i: vectors[i] for i in levels}

    def update(self, twin, velocity):
        if self.variant.optimizer == "sgd":
            return super().update(twin, velocity)
        # Norms in unnamed sequences: of the shortcuts, the projector and the predictors.
        gaps = ("shortcut.norm.weight", ".1.norm.weight")
        for name, p in twin.named_parameters():
            if p.grad is None:
                continue
            gradient, local = p.grad, 1.0
            in_gap = self.variant.optimizer == "released" and name.endswith(gaps)
            if p.dim() > 1 or in_gap:
                gradient = p.grad + WEIGHT_DECAY * p.data
                local = TRUST * p.data.norm() / (p.grad.norm() + WEIGHT_DECAY * p.data.norm())
            old = velocity.get(name, 0.0)
            velocity[name] = SGD_MOMENTUM * old + LARS_LR * local * gradient
            p.data = p.data - velocity[name]
