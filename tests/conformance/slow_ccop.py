"""CCOP (arXiv 2111.13651), restated for its conformance test."""

import math
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from parts import dot, enqueue, pixels, spread, top_down, unit
from torch import Tensor
from torchvision.ops import roi_align
from training_step import Case, Restatement

from region_pretrain.modeling.heads import VectorNorm
from region_pretrain.projects.ccop import Feedback

MOMENTUM, TEMPERATURE, SEED = (0.8, 0.6), 0.3, 5
WEIGHTS = {"image": 0.7, "inter": 0.9, "intra": 1.3}
MARGIN, MAX_PAIR_IOU = 0.1, 0.125
SLOTS, CANDIDATES = 5, 4
DRAWS = 0  # seed of dropout and of random positives


class Variant(NamedTuple):
    """``queue`` is the length of the queue of regions."""

    size: int = 64
    queue: int = 10
    head_norm: str = ""
    dropout: float = 0.0
    anchor: str = "column"
    hardest: bool = True
    feedback: Feedback | None = None
    shuffle: bool = True
    channels: str = "RGB"


class Candidate(NamedTuple):
    number: int  # from 0; CANDIDATES is the region itself
    box: Tensor
    iou: Tensor


class Slot(NamedTuple):
    rank: int
    image: int
    slot: int


def iou(a: Tensor, b: Tensor) -> Tensor:
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def info_nce(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    positive = torch.exp(dot(query, key) / TEMPERATURE)
    return -torch.log(
        positive / (positive + sum(torch.exp(dot(query, n) / TEMPERATURE) for n in queue))
    )


class SlowCCOP(Restatement):
    """With two twins, the backbone's batch norm is per process and key images are shuffled."""

    def __init__(self, case: Case, variant: Variant, ranks: int = 1) -> None:
        super().__init__(case, ranks)
        self.variant, self.level = variant, 0.0

    def query(self, twin):
        return {
            "backbone": twin.backbone,
            "image_head": twin.image_head,
            "region_head": twin.region_head,
        }

    def copies(self, twin):
        return [(module, twin.key[name]) for name, module in self.query(twin).items()]

    def momentum(self, progress):
        return MOMENTUM[0] + (MOMENTUM[1] - MOMENTUM[0]) * progress

    def difficulty(self) -> tuple[float, float, float]:
        """Ranges of the centre's and the log size's noise, and the IoU floor."""
        loop = self.variant.feedback
        if loop is None:
            self.level = (self.iteration + 1) / self.max_iter
        elif self.iteration and self.iteration % loop.period == 0:
            total, count = self.twins[0].curriculum.measured.tolist()
            for twin in self.twins:
                twin.curriculum.measured.zero_()
            if count:
                self.level += loop.gain * (total / count - loop.set_point)
                self.level = min(max(self.level, 0.0), 1.0)
        return 0.15 + 0.45 * self.level, 0.35 + 1.05 * self.level, 0.8 - 0.4 * self.level

    def candidates(self, region: Tensor, noise: Tensor) -> list[Candidate]:
        """The valid ones."""
        center, log_size, floor = self.difficulty_now
        x1, y1, x2, y2 = region
        found = []
        for number, (u1, u2, u3, u4) in enumerate(noise):
            cx = (x1 + x2) / 2 + (x2 - x1) * center * u1
            cy = (y1 + y2) / 2 + (y2 - y1) * center * u2
            w = (x2 - x1) * torch.exp(log_size * u3)
            h = (y2 - y1) * torch.exp(log_size * u4)
            box = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            box = box.clamp(0, self.variant.size)
            overlap = iou(box.to(torch.float32), region.to(torch.float32))
            if overlap >= floor:
                found.append(Candidate(number, box, overlap))
        return [*found, Candidate(CANDIDATES, region, torch.tensor(1.0))]

    def pool(self, maps: list[Tensor], boxes: list[tuple[int, Tensor]]) -> Tensor:
        """(image, box) pairs, each from its level, flattened."""
        pooled = [maps[0].float().new_zeros(0, 16 * 49)]
        for i, box in boxes:
            scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1])) / self.variant.size
            level = 0 if scale <= 1 / 4 else 1 if scale <= 2 / 4 else 2 if scale <= 3 / 4 else 3
            image = maps[level][i : i + 1].float()
            ratio = image.shape[-1] / self.variant.size  # map pixels per view pixel
            pooled.append(roi_align(image, [box[None] * ratio], 7, 1.0, 2, True).flatten(1))
        return torch.cat(pooled)

    def through(self, heads, rows: list[Tensor]) -> list[list[Tensor]]:
        """Each twin's unit vectors. The heads' batch norms see the rows of all processes."""
        sizes = [len(x) for x in rows]
        for layers in zip(*heads, strict=True):
            if isinstance(layers[0], VectorNorm):
                outputs = [self.call(layer, torch.cat(rows)) for layer in layers]
                rows = [y[sum(sizes[:n]) :][: sizes[n]] for n, y in enumerate(outputs)]
            else:
                rows = [self.call(layer, x) for layer, x in zip(layers, rows, strict=True)]
        return [list(unit(x)) if len(x) else [] for x in rows]

    def embed(self, networks, images: list[Tensor], *passes):
        """For each twin, vectors of its images and, for each pass, of its (image, box) pairs."""
        trunks, maps = [], []
        for network, x in zip(networks, images, strict=True):
            bottom_up = self.call(network["backbone"].bottom_up, x)
            trunks.append(bottom_up["res5"].mean(dim=(2, 3)))
            maps.append(self.call(lambda x, n=network: top_down(n["backbone"], x), bottom_up))
        vectors = [self.through([n["image_head"] for n in networks], trunks)]
        for boxes in passes:
            pooled = [self.pool(m, b) for m, b in zip(maps, boxes, strict=True)]
            vectors.append(self.through([n["region_head"] for n in networks], pooled))
        return vectors

    def forward(self, batches):
        if self.iteration == 0:
            torch.manual_seed(DRAWS)
        self.difficulty_now = self.difficulty()
        ranks, size = range(len(batches)), len(batches[0])
        images = [(r, i) for r in ranks for i in range(size)]
        regions = [
            Slot(r, i, k)
            for r, i in images
            for k in range(SLOTS)
            if batches[r].views[1].valid[i, k]
        ]
        x = [
            [pixels(seen, self.precision.dtype, self.variant.channels) for seen in b.views]
            for b in batches
        ]
        boxes = [[batches[r].views[v].boxes[i, k] for r, i, k in regions] for v in (0, 1)]
        key_box = dict(zip(regions, boxes[1], strict=True))

        per_rank = [
            [(s.image, box) for s, box in zip(regions, boxes[0], strict=True) if s.rank == r]
            for r in ranks
        ]
        vectors = self.embed([self.query(t) for t in self.twins], [y[0] for y in x], per_rank)
        z, q = (sum(of_rank, []) for of_rank in vectors)
        z, q = dict(zip(images, z, strict=True)), dict(zip(regions, q, strict=True))

        candidates = {}
        for s in regions:
            index = batches[s.rank].indices[s.image].item()
            generator = np.random.default_rng([SEED, self.iteration, index])
            noise = generator.random((SLOTS, CANDIDATES, 4), np.float32)[s.slot] - np.float32(0.5)
            candidates[s] = self.candidates(key_box[s], torch.from_numpy(noise))
        key_z, key_c, key_o = self.keys(x, images, regions, candidates, key_box)

        chosen = {}
        draws = torch.zeros(len(regions), CANDIDATES + 1)
        if not self.variant.hardest:
            draws = torch.rand(draws.shape, dtype=self.precision.dtype)
        for s, draw in zip(regions, draws, strict=True):
            chosen[s] = min(
                candidates[s],
                key=lambda c, s=s, draw=draw: (
                    dot(q[s], key_c[s, c.number]).item()
                    if self.variant.hardest
                    else draw[c.number].item()
                ),
            )
        positive = {s: key_c[s, chosen[s].number] for s in regions}
        similarity = {s: dot(q[s], positive[s]).detach() for s in regions}

        pairs = [
            (a, b)
            for a, b in permutations(regions, 2)
            if a[:2] == b[:2] and iou(key_box[a], key_box[b]) < MAX_PAIR_IOU
        ]
        # Means over the regions and pairs of all processes; DDP averages each process's part.
        per_region, per_pair = (len(ranks) / max(len(n), 1) for n in (regions, pairs))
        outputs = []
        for r, twin in zip(ranks, self.twins, strict=True):
            mine = [s for s in regions if s.rank == r]
            own = [key_z[r, i] for i in range(size)]
            image = sum(info_nce(z[r, i], own[i], twin.image_queue.keys) for i in range(size))
            inter = sum(info_nce(q[s], positive[s], twin.region_queue.keys) for s in mine)
            intra = 0.0
            for a, b in pairs:
                if a.rank == r:
                    anchor = b if self.variant.anchor == "column" else a
                    margin = dot(q[a], key_o[b]) - dot(q[anchor], key_o[anchor]) + MARGIN
                    intra = intra + max(margin, torch.zeros_like(margin))
            # Every parameter has a gradient on every rank, even if no region is there.
            zero = sum(0 * p.sum() for m in self.query(twin).values() for p in m.parameters())
            found = {
                "loss_image": WEIGHTS["image"] * image / size,
                "loss_inter": WEIGHTS["inter"] * inter * per_region + zero,
                "loss_intra": WEIGHTS["intra"] * intra * per_pair + zero,
                "image_embedding_std": spread(own),
            }
            if len(mine) > 1:
                found["region_embedding_std"] = spread([key_o[s] for s in mine])
            valid = [(len(candidates[s]) - 1) / CANDIDATES for s in mine]
            sums = {
                "valid_fraction": torch.tensor(valid),
                "chosen_iou": torch.tensor([chosen[s].iou for s in mine]),  # in float32
                "chosen_similarity": torch.tensor([similarity[s] for s in mine]).to(z[0, 0].dtype),
            }
            for name, values in sums.items():
                found[f"curriculum/{name}"] = values.sum().to(z[0, 0].dtype) * per_region
            outputs.append(found)

        enqueue([twin.image_queue for twin in self.twins], [key_z[i] for i in images])
        enqueue([twin.region_queue for twin in self.twins], [positive[s] for s in regions])
        if self.variant.feedback is not None:
            for twin in self.twins:
                twin.curriculum.measured[0] += sum(similarity.values())
                twin.curriculum.measured[1] += len(similarity)
        return outputs

    @torch.no_grad()
    def keys(self, x, images, regions, candidates, key_box):
        """Vectors of images, of valid candidates, and of the regions in a pass of their own.

        With two twins, each embeds images of both, with all that belongs to them, in an order known
        to all processes (MoCo, section 3.3).
        """
        order = list(range(len(images)))
        if len(self.twins) > 1:
            order = np.random.default_rng([SEED, self.iteration]).permutation(len(images)).tolist()
        size = len(images) // len(self.twins)
        parts = [
            [images[n] for n in order[rank * size : (rank + 1) * size]]
            for rank in range(len(self.twins))
        ]
        shown = [torch.stack([x[r][1][i] for r, i in part]) for part in parts]
        slots = [
            [(p, s) for p, at in enumerate(part) for s in regions if s[:2] == at] for part in parts
        ]
        drawn = [[(p, s, c) for p, s in part for c in candidates[s]] for part in slots]
        vectors = self.embed(
            [twin.key for twin in self.twins],
            shown,
            [[(p, c.box) for p, _, c in part] for part in drawn],
            [[(p, key_box[s]) for p, s in part] for part in slots],
        )
        names = [
            sum(parts, []),
            [(s, c.number) for part in drawn for _, s, c in part],
            [s for part in slots for _, s in part],
        ]
        return [
            dict(zip(name, sum(found, []), strict=True))
            for name, found in zip(names, vectors, strict=True)
        ]
