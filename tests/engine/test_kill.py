"""SoCo runs killed as a scheduler kills a job: SIGKILL from outside, at any instant."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from equality import equal
from tiny_run import CLOCK, final_checkpoint

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"
ITERATIONS = 14


class Run:
    """A pre-training through its command line, in a session that can be killed."""

    def __init__(self, folder: Path, region_folder, processes: int) -> None:
        self.folder = folder
        self.command = [
            *(sys.executable, str(ROOT / "tools/pretrain_net.py"), "--config-file", str(RECIPE)),
            *("--num-gpus", str(processes), "--resume"),
            f"train.output_dir={folder}",
            f"dataloader.train.dataset.names=folder://{region_folder.images}",
            f"dataloader.train.dataset.regions={region_folder.store}",
            "dataloader.train.dataset.views.sizes=[32,32,16]",
            "dataloader.train.total_batch_size=4",
            f"train.max_iter={ITERATIONS}",
            "train.log_period=1",
            "train.checkpointer.period=3",
            "train.checkpointer.max_to_keep=2",
            "train.device=cpu",
        ]

    def start(self, workers: int = 0, *overrides: str) -> subprocess.Popen:
        more = [f"dataloader.train.num_workers={workers}", *overrides]
        log = open(self.folder.with_suffix(".out"), "ab")
        with log:
            return subprocess.Popen(
                [*self.command, *more], stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, workers: int = 0) -> None:
        assert self.start(workers).wait(300) == 0, self.output()[-3000:]

    def output(self) -> str:
        return self.folder.with_suffix(".out").read_text(errors="replace")

    def lines(self) -> list[dict]:
        """metrics.json without timings, and without a line that is still being written."""
        path = self.folder / "metrics.json"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append({k: v for k, v in json.loads(line).items() if k not in CLOCK})
            except ValueError:
                assert line is lines[-1]
        return found

    # Instants to kill at; each returns whether it has come.

    def in_first_iteration(self) -> bool:
        return "Starting training from iteration 0" in self.output()

    def in_step(self, iteration: int):
        return lambda: any(line["iteration"] >= iteration for line in self.lines())

    def in_save(self) -> bool:
        return any(".pth.part" in name for name in os.listdir(self.folder))

    def after_last(self) -> bool:
        return (self.folder / "model_final.pth").exists()

    def kill(self, come, delay: float, workers: int) -> bool:
        """Start, and kill ``delay`` seconds after an instant; False: it ended before that."""
        process = self.start(workers)
        deadline = time.monotonic() + 300
        while process.poll() is None:
            assert time.monotonic() < deadline
            if self.folder.exists() and come():
                time.sleep(delay)
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                break
            time.sleep(0.0005)
        return process.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_instants_it_follows_the_undisturbed_run(
    region_folder, tmp_path, monkeypatch, processes
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed of the instants: {seed}")  # shown when the test fails
    rng = random.Random(seed)
    whole = Run(tmp_path / "whole", region_folder, processes)
    killed = Run(tmp_path / "killed", region_folder, processes)
    whole.finish()

    instants = {
        "the first iteration": (killed.in_first_iteration, rng.uniform(0, 0.1)),
        "a step": (killed.in_step(rng.randrange(1, 5)), rng.uniform(0, 0.3)),
        "a save": (killed.in_save, 0.0),
        "another step": (killed.in_step(rng.randrange(7, 11)), rng.uniform(0, 0.3)),
        "after the last": (killed.after_last, 0.0),
    }
    if processes == 2:
        del instants["another step"]  # each attempt starts two processes
    workers = itertools.cycle([0, 1, 2])
    died = [name for name, at in instants.items() if killed.kill(*at, workers=next(workers))]
    killed.finish(workers=1)
    # On a slow disk or a fast machine one may come too late; most must have struck.
    assert len(died) >= len(instants) - 2 and "the first iteration" in died, died

    assert [line["iteration"] for line in whole.lines()] == list(range(ITERATIONS))
    assert killed.lines() == whole.lines()  # every loss of every iteration, bit for bit, each once
    for line in whole.lines():
        assert {"total_loss", "loss_view2", "loss_view3", "lr", "target_momentum"} <= line.keys()
    files = [final_checkpoint(run.folder) for run in (whole, killed)]
    assert len(files[0]["rng"]) == processes
    assert equal(*files)
    assert not list(killed.folder.glob("*.part*"))


def test_another_number_of_processes_is_refused_or_sees_the_same_images(
    region_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = Run(tmp_path / "whole", region_folder, 1)
    whole.finish()
    one = Run(tmp_path / "changed", region_folder, 1)
    one.kill(one.in_step(5), 0.0, workers=0)
    two = Run(tmp_path / "changed", region_folder, 2)
    assert two.start().wait(300) == 2
    assert "written by 1 processes, now there are 2" in two.output()
    allowed = two.start(0, "train.allow_world_size_change=True")
    assert allowed.wait(300) == 0, two.output()[-3000:]
    assert [line["iteration"] for line in two.lines()] == list(range(ITERATIONS))
    resumed = int(re.findall(r"Starting training from iteration (\d+)", two.output())[-1])
    assert resumed in (3, 6)
    assert two.lines()[:resumed] == whole.lines()[:resumed]
    # The first step from the same state shows the same images; later ones drift apart by rounding.
    a, b = whole.lines()[resumed], two.lines()[resumed]
    assert b["total_loss"] == pytest.approx(a["total_loss"], abs=1e-4)
