"""Point-level region contrast (arXiv 2202.04639), restated for its conformance test."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from parts import dot, enqueue, pixels, spread, unit
from torch import Tensor, nn
from training_step import Case, Restatement

from region_pretrain.data.batch import View
from region_pretrain.modeling.heads import VectorNorm

# The momenta are low, so that a wrong step of an average is large.
MOMENTUM, CENTER_MOMENTUM, SEED = (0.8, 0.6), 0.7, 5
IMAGE_TEMPERATURE, POINT_TEMPERATURE = 0.3, 0.25
STUDENT, TEACHER, WARMUP = 0.15, (0.06, 0.09), 0.5  # temperatures of affinities
SIZE, CELLS = 64, 4  # sides of a view, in pixels and in cells
POINTS, PLACES = 8, 6  # per view


class Variant(NamedTuple):
    """Settings of the method; ``weights`` are those of image, point and affinity loss."""

    feature: str = "res5"  # of the trunk; p4 of the FPN, res4 of a C4 detector
    head_norm: str = ""
    prototypes: int = 0
    others: str = "local"
    in_image: bool = True
    log: str = "outside"
    pool: int = 1
    same_view: bool = False
    shuffle: bool = True
    weights: tuple[float, float, float] = (0.7, 0.3, 0.4)
    channels: str = "RGB"


class Point(NamedTuple):
    vector: Tensor
    region: int


@dataclass
class Image:
    """One image, its process, and that process's twin.

    ``query`` and ``key`` are the heads' outputs by name, ``(h, w, D)``; ``partner`` is the affinity
    head's alone.
    """

    rank: int
    process: int
    views: list[View]
    query: dict[str, Tensor]
    key: dict[str, Tensor]
    partner: Tensor | None

    def points(self, which: int, maps: dict[str, Tensor], pool: int) -> list[Point]:
        """Unit vectors of the regions' points in a view."""
        view, found = self.views[which], []
        for first in range(0, POINTS, pool):
            slots = range(first, first + pool)
            if all(view.valid[0, s] for s in slots):
                mean = sum(at(maps["head"], view.boxes[0, s, :2]) for s in slots) / pool
                found.append(Point(unit(mean[None])[0], view.region_ids[0, first].item()))
        return found


def p4(fpn: nn.Module, x: Tensor) -> Tensor:
    """A level of the FPN; finer ones are not computed."""
    maps = fpn.bottom_up(x)
    above = fpn.fpn_lateral5(maps["res5"])
    above = above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return fpn.fpn_output4(fpn.fpn_lateral4(maps["res4"]) + above)


def at(grid: Tensor, xy: Tensor) -> Tensor:
    """Bilinear interpolation of ``(h, w, D)`` at a point in pixels of the view."""
    h, w = grid.shape[:2]
    x = min(max(xy[0].item() * w / SIZE - 0.5, 0), w - 1)
    y = min(max(xy[1].item() * h / SIZE - 0.5, 0), h - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, w - 1), min(top + 1, h - 1)
    above = grid[top, left] + (x - left) * (grid[top, right] - grid[top, left])
    below = grid[bottom, left] + (x - left) * (grid[bottom, right] - grid[bottom, left])
    return above + (y - top) * (below - above)


def similarity(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    return torch.exp(dot(a, b) / temperature)


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """Cross entropy of two rows of logits."""
    target = torch.exp(teacher - teacher.max())
    predicted = torch.exp(student - student.max())
    return -(target / target.sum() * torch.log(predicted / predicted.sum())).sum()


class SlowPointRegionContrast(Restatement):
    """With two twins, backbones have batch norm per process, and key images are shuffled.

    Args:
        case: as for the base class.
        variant: the case's settings.
        ranks: number of twins.
        processes: number of processes with one twin, for the points that each of them sees.
    """

    def __init__(self, case: Case, variant: Variant, ranks: int = 1, processes: int = 1) -> None:
        super().__init__(case, ranks)
        self.variant, self.processes = variant, max(ranks, processes)

    def online(self, twin):
        modules = {"backbone": twin.backbone, "head": twin.head}
        if self.variant.feature == "res4":
            modules["res5"] = twin.roi_heads.res5
        if self.variant.weights[2]:
            modules["affinity_head"] = twin.affinity_head
        return modules

    def copies(self, twin):
        return [(module, twin.key[name]) for name, module in self.online(twin).items()]

    def momentum(self, progress):
        return MOMENTUM[0] + (MOMENTUM[1] - MOMENTUM[0]) * progress

    def _step(self, batch):
        self.before = [[p.data for p in twin.key.parameters()] for twin in self.twins]
        return super()._step(batch)  # updates the key network first

    def features(self, network, x: Tensor) -> Tensor:
        if self.variant.feature == "p4":
            return self.call(lambda x: p4(network["backbone"], x), x)
        if self.variant.feature == "res5":
            return self.call(network["backbone"].bottom_up, x)["res5"]
        return self.call(network["res5"], self.call(network["backbone"], x)["res4"])

    def embed(self, networks, images: list[Tensor], heads: list[str]) -> list[dict[str, Tensor]]:
        """The heads' outputs for each image; every twin's network embeds its part of them."""
        size, rows = len(images) // len(networks), []
        for rank, network in enumerate(networks):
            maps = self.features(network, torch.stack(images[rank * size : (rank + 1) * size]))
            h, w = maps.shape[-2:]
            where = [(i, y, x) for i in range(size) for y in range(h) for x in range(w)]
            rows.append(torch.stack([maps[i, :, y, x] for i, y, x in where]))
        found = [{} for _ in images]
        for name in heads:
            mlps, outputs = [getattr(n[name], "mlp", n[name]) for n in networks], rows
            for layers in zip(*mlps, strict=True):
                outputs = self.through(layers, outputs)
            outputs = torch.cat(outputs).float()
            outputs = unit(outputs) if name == "affinity_head" else outputs
            for maps, grid in zip(found, outputs.reshape(len(images), h, w, -1), strict=True):
                maps[name] = grid
        return found

    def through(self, layers, rows: list[Tensor]) -> list[Tensor]:
        """Each twin's layer on its rows. The heads' batch norms see the rows of all processes."""
        if not isinstance(layers[0], VectorNorm):
            return [self.call(layer, x) for layer, x in zip(layers, rows, strict=True)]
        size, outputs = len(rows[0]), [self.call(layer, torch.cat(rows)) for layer in layers]
        return [y[rank * size : (rank + 1) * size] for rank, y in enumerate(outputs)]

    @torch.no_grad()
    def keys(self, images: list[Tensor], heads: list[str], number: int) -> list[dict[str, Tensor]]:
        """The key network; each of two twins embeds images of both, in a known random order."""
        order = list(range(len(images)))
        if len(self.twins) > 1:
            generator = np.random.default_rng([SEED, self.iteration, number])
            order = generator.permutation(len(images)).tolist()
        found = self.embed([t.key for t in self.twins], [images[i] for i in order], heads)
        return [found[order.index(i)] for i in range(len(images))]

    @torch.no_grad()
    def teacher(self, images: list[Tensor]) -> list[Tensor]:
        """Affinity vectors and prototypes of the key network before the step's update."""
        after = [[p.data for p in twin.key.parameters()] for twin in self.twins]
        self.set_keys(self.before)
        found = [maps["affinity_head"] for maps in self.keys(images, ["affinity_head"], 1)]
        if self.variant.prototypes:
            self.prototypes = unit(self.twins[0].key["affinity_head"].prototypes)
        self.set_keys(after)
        return found

    def set_keys(self, values):
        for twin, of_twin in zip(self.twins, values, strict=True):
            for p, value in zip(twin.key.parameters(), of_twin, strict=True):
                p.data = value

    def forward(self, batches):
        singles = [one for batch in batches for one in batch.chunk(len(batch))]
        count = len(singles)
        views = [
            [
                pixels(one.views[j], self.precision.dtype, self.variant.channels)[0]
                for one in singles
            ]
            for j in range(len(singles[0].views))
        ]
        heads = ["head", "affinity_head"] if self.variant.weights[2] else ["head"]
        query = self.embed([self.online(twin) for twin in self.twins], views[0], heads)
        partner = self.teacher(views[2]) if self.variant.weights[2] else [None] * count
        key = self.keys(views[1], heads, 0)
        images = [
            Image(
                n * len(self.twins) // count,
                n * self.processes // count,
                singles[n].views,
                query[n],
                key[n],
                partner[n],
            )
            for n in range(count)
        ]
        outputs = [{} for _ in self.twins]
        losses = {
            "image": self.image_loss,
            "point": self.point_loss,
            "affinity": self.affinity_loss,
        }
        for (name, loss), weight in zip(losses.items(), self.variant.weights, strict=True):
            if weight:
                for mine, found in zip(outputs, loss(images), strict=True):
                    mine |= found
                    mine[f"loss_{name}"] = weight * found[f"loss_{name}"]
        return outputs

    def image_loss(self, images: list[Image]):
        """Equation 1 of MoCo; an image's vector is the spatial mean of the head's outputs."""
        q, k = (
            [unit(maps["head"].mean(dim=(0, 1))[None])[0] for maps in of_view]
            for of_view in ([image.query for image in images], [image.key for image in images])
        )
        outputs = []
        for rank, twin in enumerate(self.twins):
            mine, loss = [n for n, image in enumerate(images) if image.rank == rank], 0.0
            for n in mine:
                positive = similarity(q[n], k[n], IMAGE_TEMPERATURE)
                others = sum(similarity(q[n], old, IMAGE_TEMPERATURE) for old in twin.queue.keys)
                loss = loss - torch.log(positive / (positive + others)) / len(mine)
            outputs.append({"loss_image": loss, "embedding_std": spread([k[n] for n in mine])})
        enqueue([twin.queue for twin in self.twins], k)
        return outputs

    def point_loss(self, images: list[Image]):
        """The mean over all points of the query view that have a positive."""
        v = self.variant
        f = [image.points(0, image.query, v.pool) for image in images]
        g = [image.points(1, image.key, v.pool) for image in images]
        bank = [keys + mine if v.same_view else keys for keys, mine in zip(g, f, strict=True)]
        queues = [twin.contrast.queue for twin in self.twins]
        losses, cosines = ([[] for _ in self.twins] for _ in range(2))
        for n, image in enumerate(images):
            far = []
            if v.others == "queue":
                far = list(queues[0].keys)
            elif v.others != "none":
                for m, other in enumerate(images):
                    if m != n and (v.others == "gathered" or other.process == image.process):
                        far += [c.vector for c in bank[m]]
            for a in f[n]:
                candidates = [c for c in bank[n] if c is not a]
                positives = [c.vector for c in candidates if c.region == a.region]
                if not positives:
                    continue
                near = [c.vector for c in candidates] if v.in_image else positives
                total = sum(similarity(a.vector, c, POINT_TEMPERATURE) for c in near + far)
                found = [similarity(a.vector, p, POINT_TEMPERATURE) for p in positives]
                if v.log == "outside":
                    loss = -sum(torch.log(x / total) for x in found) / len(found)
                else:
                    loss = -torch.log(sum(found) / total)
                losses[image.rank].append(loss)
                cosines[image.rank] += [dot(a.vector, p).detach() for p in positives]
        if v.others == "queue":
            enqueue(queues, [p.vector for points in g for p in points])
        outputs = self.parts_of_the_mean("point", losses)
        for mine, own, found in zip(losses, cosines, outputs, strict=True):
            found["points/similarity"] = sum(own) / len(own)
            found["points/per_image"] = torch.tensor(len(mine) * len(self.twins) / len(images))
        return outputs

    def affinity_loss(self, images: list[Image]):
        """The mean over all places that query view and partner share."""
        progress = self.iteration / self.max_iter
        tau = TEACHER[0] + (TEACHER[1] - TEACHER[0]) * min(progress / WARMUP, 1)
        centers = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * SIZE / CELLS
        losses, similarities = [[] for _ in self.twins], []
        for image in images:
            twin, (query, _, partner) = self.twins[image.rank], image.views
            cells = [torch.stack([x, y]) for y in centers for x in centers]
            k = torch.stack([at(image.key["affinity_head"], xy) for xy in cells])
            for place in range(PLACES):
                if not partner.valid[0, place]:
                    continue
                s = at(image.query["affinity_head"], query.boxes[0, POINTS + place, :2])
                t = at(image.partner, partner.boxes[0, place, :2])
                loss = cross_entropy(k @ t / tau, k @ s / STUDENT)
                if self.variant.prototypes:
                    similarities.append(self.prototypes @ t)
                    centered = similarities[-1] - twin.distillation.center
                    own = unit(twin.affinity_head.prototypes) @ s
                    loss = loss + cross_entropy(centered / tau, own / STUDENT)
                losses[image.rank].append(loss)
        if similarities:
            mean, m = sum(similarities) / len(similarities), CENTER_MOMENTUM
            for d in [twin.distillation for twin in self.twins]:
                d.center = m * d.center + (1 - m) * mean
        outputs = self.parts_of_the_mean("affinity", losses)
        for mine, found in zip(losses, outputs, strict=True):
            found["places/per_image"] = torch.tensor(len(mine) * len(self.twins) / len(images))
            found["places/teacher_temperature"] = torch.tensor(tau)
        return outputs

    def parts_of_the_mean(self, name: str, losses: list[list[Tensor]]) -> list[dict[str, Tensor]]:
        """Each twin's part of the mean over the losses of all twins; DDP averages the parts."""
        count = sum(len(mine) for mine in losses)
        return [{f"loss_{name}": sum(mine) / count * len(losses)} for mine in losses]
