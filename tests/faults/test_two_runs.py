"""Two runs in one output folder, or two makers of one region store."""

import os
import signal
import time

import pytest
from fault_runs import Run
from forked import LONG, Process

from region_pretrain.data.catalog import get_records
from region_pretrain.errors import UserError
from region_pretrain.lease import PREFIX, hold
from region_pretrain.regions import RegionStore, generate
from region_pretrain.regions.generate import make_regions


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("whole") / "run")
    assert run.finish() == 0, run.output()
    return run.losses()


@pytest.fixture
def codes_of(tmp_path, monkeypatch):
    """Exit codes of processes, of which one trains; it waits for the end of the others."""
    gate = tmp_path / "gate"
    monkeypatch.setenv("WAIT_FOR", str(gate))

    def wait(processes):
        deadline = time.monotonic() + LONG
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gate.touch()
        return [process.wait(LONG) for process in processes]

    return wait


@pytest.mark.parametrize("kind", ["kind=pretrain", "kind=finetune"])
def test_of_two_that_start_together_one_is_refused_in_one_line(tmp_path, kind, whole, codes_of):
    runs = [Run(tmp_path / "run", 1, kind, f"train.seed={seed}") for seed in (0, 1)]
    codes = codes_of([run.start() for run in runs])
    assert sorted(codes) == [0, 2], runs[0].output()
    lines = [line for line in runs[0].output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"{tmp_path / 'run'} is in use by process" in lines[0]
    assert "Traceback" not in runs[0].output()
    iterations = [line["iteration"] for line in runs[0].losses() if "total_loss" in line]
    assert iterations == sorted(set(iterations)) and len(iterations) in (12, 20)
    if kind == "kind=pretrain" and codes[0] == 0:
        assert runs[0].losses() == whole


def test_of_several_resumes_of_a_killed_run_one_continues_it(tmp_path, whole, codes_of):
    run = Run(tmp_path / "run", 1, "resume=True", "train.checkpointer.period=3")
    process = run.start()
    run.wait_for(7, process)
    os.killpg(process.pid, signal.SIGKILL)  # nobody has waited for it yet: it is a zombie
    assert sorted(codes_of([run.start() for _ in range(3)])) == [0, 2, 2], run.output()
    assert run.output().count("is in use by process") == 2
    assert run.losses() == whole
    assert process.wait(1) == -signal.SIGKILL


def test_a_second_one_leaves_a_running_one_undisturbed(tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_FOR", str(tmp_path / "refused"))
    run = Run(tmp_path / "run", 2)
    process = run.start()
    run.wait_for(2, process)
    assert run.finish("resume=True") == 2  # the launcher returns the code of its processes
    (tmp_path / "refused").touch()
    assert process.wait(LONG) == 0, run.output()
    assert [line["iteration"] for line in run.losses()] == list(range(20))


def make(images, out, shard=(0, 1)):
    records = get_records(f"folder://{images}")
    make_regions(records, out, "grid-v1", workers=1, shard=shard, part_size=4)


def test_two_makers_of_the_same_shard(region_folder, tmp_path, monkeypatch):
    out = str(tmp_path / "grid.arrow")
    process = generate._process

    def wait(recipe, record):
        while not (tmp_path / "refused").exists():
            time.sleep(0.02)
        return process(recipe, record)

    def make_slowly():
        generate._process = wait
        make(region_folder.images, out)

    first = Process(make_slowly, tmp_path / "out.txt")
    deadline = time.monotonic() + LONG
    while not (tmp_path / "grid.arrow.parts" / f"{PREFIX}-0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(generate, "hold", lambda *a: hold(*a, patience=0.2))
    try:
        with pytest.raises(UserError, match=r"shard 0 of .*grid.arrow is in use by process"):
            make(region_folder.images, out)
        make(region_folder.images, out, (2, 3))  # another shard may run beside it
    finally:
        (tmp_path / "refused").touch()
    assert first.wait(LONG) == 0, (tmp_path / "out.txt").read_text()
    assert len(RegionStore.open(out)) == 12
    assert not (tmp_path / "grid.arrow.parts").exists()
