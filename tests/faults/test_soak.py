"""A few kills at random moments; ``make soak`` tries 200."""

import random

from soak import ITERATIONS, METHODS, describe, soak, tracebacks


def test_killed_runs_equal_unkilled_ones(tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown when the test fails
    lines = []
    found = soak(tmp_path, 6, seed, lines.append)
    assert len(found.kills) == len(lines) == 6 and ITERATIONS == 24 and len(METHODS) == 6
    method, processes, *_ = found.kills[0]
    assert lines[0].startswith(f"[1/6] {method} x {processes}: ") and "; ETA 0:" in lines[0]
    assert max(found.runs.values()) == 1 and {m for m, *_ in found.kills} <= set(METHODS)
    assert describe(found).endswith("all equal to the unkilled ones bit for bit")


def test_tracebacks_of_killed_connections_are_left_out():
    head = "Traceback (most recent call last):\n"
    ours = '  File "region_pretrain/engine/run.py", line 1, in run\nValueError: x\n'
    pythons = (
        '  File "/usr/lib/python3.11/multiprocessing/resource_sharer.py", line 138, in _serve\n'
        "    with self._listener.accept() as conn:\nConnectionResetError: [Errno 104] reset\n"
    )
    assert tracebacks(f"iter 1\n{head}{pythons}iter 2\n") == []
    text = f"{head}{pythons}iter 2\n{head}{ours}"
    assert tracebacks(text) == [ours] == tracebacks(f"{head}{ours}")
