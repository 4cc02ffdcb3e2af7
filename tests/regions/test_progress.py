"""The progress file that make_regions keeps while it works."""

import os
import time
from types import SimpleNamespace

import pytest

from region_pretrain.progress import read_progress
from region_pretrain.regions import generate
from region_pretrain.regions.generate import make_regions


@pytest.fixture
def clock(monkeypatch):
    """Simulate the seconds per image, and collect the progress file before each image."""
    state = SimpleNamespace(now=100.0, seconds_per_image=2.0, file="", seen=[], fail_after=None)
    process = generate._process

    def slow(recipe, record):
        found = read_progress(state.file)
        state.seen.append((found.done, found.total, found.seconds_left))
        if len(state.seen) == state.fail_after:
            raise KeyboardInterrupt
        state.now += state.seconds_per_image
        return process(recipe, record)

    monkeypatch.setattr(generate, "_process", slow)
    monkeypatch.setattr("time.monotonic", lambda: state.now)
    return state


def test_progress_of_a_shard(tmp_path, records, clock):
    out = str(tmp_path / "r.arrow")
    clock.file = f"{out}.parts/progress-1.json"
    make_regions(records, out, "grid-v1", 1, (1, 2), part_size=3)  # 3 + 2 of the 11 images
    seen = [(0, 5, None), (1, 5, 8.0), (2, 5, 6.0), (3, 5, 4.0), (4, 5, 2.0)]
    assert clock.seen == seen
    last = read_progress(clock.file)
    assert (last.done, last.total, last.seconds_left) == (5, 5, 0.0)
    assert time.time() - 60 < last.updated <= time.time()
    clock.file = f"{out}.parts/progress-0.json"
    make_regions(records, out, "grid-v1", 1, (0, 2), part_size=3)
    assert clock.seen[5:7] == [(0, 6, None), (1, 6, 10.0)]
    assert not os.path.exists(out + ".parts")


def test_progress_is_written_at_most_once_per_second(tmp_path, records, clock):
    out = str(tmp_path / "r.arrow")
    clock.file, clock.seconds_per_image = f"{out}.parts/progress-0.json", 0.375
    make_regions(records, out, "grid-v1", 1)
    done = [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert [seen[0] for seen in clock.seen] == done
    assert clock.seen[3] == (3, 11, 3.0)


def test_progress_after_an_interruption_starts_with_the_finished_parts(tmp_path, records, clock):
    out = str(tmp_path / "r.arrow")
    clock.file, clock.fail_after = f"{out}.parts/progress-0.json", 8
    with pytest.raises(KeyboardInterrupt):
        make_regions(records, out, "grid-v1", 1, part_size=3)
    assert clock.seen[-1] == (7, 11, 8.0)
    clock.seen, clock.fail_after = [], None
    assert make_regions(records, out, "grid-v1", 1, part_size=3)["images"] == 11
    # Two parts of 3 images were finished; the estimate counts the images of this run alone.
    assert clock.seen == [(6, 11, None), (7, 11, 8.0), (8, 11, 6.0), (9, 11, 4.0), (10, 11, 2.0)]
