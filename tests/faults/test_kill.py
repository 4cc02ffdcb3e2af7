"""SoCo runs killed as a scheduler kills a job: SIGKILL of all processes, at any instant."""

import copy
import itertools
import os
import random
import re
import signal
import time

import pytest
from equality import equal
from forked import LONG
from soak import ITERATIONS, MethodRun, make_config, make_images
from tiny_run import final_checkpoint


def kill(run, come, delay, workers):
    """Start, and kill ``delay`` seconds after an instant; False: it ended before that."""
    process = run.start(workers)
    deadline = time.monotonic() + LONG
    while process.poll() is None:
        assert time.monotonic() < deadline, run.output()[-3000:]
        if run.folder.exists() and come():
            time.sleep(delay)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            break
        time.sleep(0.0005)
    return process.wait(LONG) == -signal.SIGKILL


def finish(run, workers=0):
    assert run.start(workers).wait(LONG) == 0, run.output()[-3000:]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_instants_it_follows_the_undisturbed_run(tmp_path, processes):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed of the instants: {seed}")  # shown when the test fails
    rng = random.Random(seed)
    cfg = make_config("SoCo", *make_images(tmp_path))
    whole = MethodRun(tmp_path / "whole", cfg, processes)
    killed = MethodRun(tmp_path / "killed", cfg, processes)
    finish(whole)

    first, second = rng.randrange(1, 8), rng.randrange(10, 18)
    starting = "Starting training from iteration 0"
    instants = {
        "the first iteration": (lambda: starting in killed.output(), rng.uniform(0, 0.1)),
        "a step": (lambda: killed.done() > first, rng.uniform(0, 0.3)),
        "a save": (killed.is_saving, 0.0),
        "another step": (lambda: killed.done() > second, rng.uniform(0, 0.3)),
        "after the last": ((killed.folder / "model_final.pth").exists, 0.0),
    }
    workers = itertools.cycle([0, 1, 2])
    died = [name for name, at in instants.items() if kill(killed, *at, workers=next(workers))]
    finish(killed, workers=1)
    # On a slow disk or a fast machine one may come too late; most must have struck.
    assert len(died) >= len(instants) - 2 and "the first iteration" in died, died

    assert [line["iteration"] for line in whole.losses()] == list(range(ITERATIONS))
    assert killed.losses() == whole.losses()  # of every iteration, bit for bit, each once
    for line in whole.losses():
        assert {"total_loss", "loss_view2", "loss_view3", "lr", "target_momentum"} <= line.keys()
    files = [final_checkpoint(run.folder) for run in (whole, killed)]
    assert len(files[0]["rng"]) == processes
    assert equal(*files)
    assert not list(killed.folder.glob("*.part*"))


def test_another_number_of_processes_is_refused_or_sees_the_same_images(tmp_path):
    cfg = make_config("SoCo", *make_images(tmp_path), norm="SyncBN")
    whole, one = (MethodRun(tmp_path / name, cfg, 1) for name in ("whole", "changed"))
    finish(whole)
    assert kill(one, lambda: one.done() > 5, 0.0, workers=0)
    last_saved = (one.done() + 1) // 3 * 3  # or the one before, if it was being written
    two = MethodRun(one.folder, cfg, 2)
    assert two.start().wait(LONG) == 2
    assert "written by 1 processes, now there are 2" in two.output()
    cfg = copy.deepcopy(cfg)
    cfg.train.allow_world_size_change = True
    finish(MethodRun(one.folder, cfg, 2))
    assert [line["iteration"] for line in two.losses()] == list(range(ITERATIONS))
    resumed = int(re.findall(r"Starting training from iteration (\d+)", two.output())[-1])
    assert resumed in (last_saved - 3, last_saved)
    assert two.losses()[:resumed] == whole.losses()[:resumed]
    # The first step from the same state shows the same images; later ones drift apart by rounding.
    a, b = whole.losses()[resumed], two.losses()[resumed]
    assert b["total_loss"] == pytest.approx(a["total_loss"], abs=1e-4)
