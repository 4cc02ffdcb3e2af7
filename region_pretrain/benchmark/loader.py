"""The loader compared with the JPEG decoder alone, on one core."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from tqdm import tqdm

from region_pretrain.benchmark.timing import interleaved
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.system import one_opencv_thread, resident_mib

_DISTINCT = 256  # files that are cycled through, so that they stay in the page cache


@dataclass
class LoaderRates:
    """Throughput of one core in images per second.

    Attributes:
        decode: ``cv2.imdecode`` of bytes in memory alone.
        linear, antialiased: complete batches of the config, with either filter for its views.
        parts: fractions of the antialiased loader's time, which sum to 1: ``decode`` (large files
            at a reduced size, see :func:`~region_pretrain.data.geometry.decode_reduction`), ``read
            and draw`` (file, header, boxes, views, photometric parameters), ``render and
            other``.
        size: mean width and height in pixels, and mean file size in kB.
        drift_mib: growth of this process's resident memory over the last two thirds of the rounds.
    """

    decode: float
    linear: float
    antialiased: float
    parts: dict[str, float]
    size: tuple[float, float, float]
    drift_mib: float


def benchmark_loader(dataset: PretrainDataset, batch_size: int, seconds: float) -> LoaderRates:
    """Measure a data set in this process.

    Args:
        dataset: the config's ``dataloader.train.dataset``.
        batch_size: images per batch; at most 32 are used.
        seconds: approximate time per quantity.
    """
    count = min(len(dataset), _DISTINCT)
    files = [dataset.read(i) for i in range(count)]
    buffers = [np.frombuffer(file.encoded.data, np.uint8) for file in files]
    drawn = dataset.draw(0, 0, range(count))
    order = itertools.cycle(range(count))
    take = min(batch_size, 32)

    def decode_only() -> None:
        for _ in range(take):
            cv2.imdecode(buffers[next(order)], cv2.IMREAD_COLOR)

    def decode_as_drawn() -> None:
        for _ in range(take):
            sample = drawn[next(order)]
            sample.file.encoded.decode(sample.reduce)

    def draw_only() -> None:
        dataset.draw(0, 0, [next(order) for _ in range(take)])

    def batches(antialias: bool) -> Callable[[], None]:
        def load() -> None:
            dataset.antialias = antialias
            dataset.batch(0, 0, [next(order) for _ in range(take)])

        return load

    before = dataset.antialias
    functions = {
        "decode": decode_only,
        "decode as drawn": decode_as_drawn,
        "draw": draw_only,
        "linear": batches(False),
        "antialiased": batches(True),
    }
    memory: list[float] = []
    try:
        with one_opencv_thread(), tqdm(desc="loader", unit=" rounds", leave=False) as progress:

            def after_round() -> None:
                memory.append(resident_mib())
                progress.update()

            per_call = interleaved(functions, seconds * len(functions), after_round)
    finally:
        dataset.antialias = before
    total = per_call["antialiased"]
    decode, draw = per_call["decode as drawn"], per_call["draw"]
    sizes = [(*file.size, len(file.encoded.data) / 1000) for file in files]
    return LoaderRates(
        decode=take / per_call["decode"],
        linear=take / per_call["linear"],
        antialiased=take / total,
        parts={
            "decode": decode / total,
            "read and draw": draw / total,
            "render and other": (total - decode - draw) / total,
        },
        size=tuple(np.mean(sizes, axis=0)),
        drift_mib=memory[-1] - memory[len(memory) // 3],
    )
