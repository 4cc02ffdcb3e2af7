"""Stands in for a training tool: logs each attempt to a file and behaves as its argument says."""

import json
import os
import signal
import sys
import time

*_, how, folder = sys.argv
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
rank = os.environ.get("RANK", "0")
path = os.path.join(folder, f"seen{rank}")
with open(path, "a") as f:
    f.write(
        json.dumps(
            {"arguments": sys.argv[1:], "cwd": os.getcwd(), "parent": os.getppid()}
            | {name: os.environ.get(name) for name in names}
        )
        + "\n"
    )
with open(path) as f:
    attempt = len(f.readlines())
signals = []
if how.startswith("signalled"):
    os.kill(os.getppid(), signal.SIGUSR2)  # as the cluster signals the task
    time.sleep(1 if how == "signalled-early" else 0)  # as if it were still importing
    signal.signal(signal.SIGUSR2, lambda *_: signals.append(1))
    while attempt <= int(how[-1] if how[-1].isdigit() else 1) and not signals:
        time.sleep(0.05)
    if signals:
        with open(os.path.join(folder, "last_checkpoint"), "w") as f:
            f.write(str(attempt))
        sys.exit(75)
if how == "killed" and attempt == 1 and rank == "0":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "worker" and attempt == 1:
    from region_pretrain.errors import ProcessKilled, exit_on_user_error

    @exit_on_user_error
    def lose_a_worker() -> None:
        raise ProcessKilled("DataLoader worker (pid 7) is killed by signal: Killed")

    lose_a_worker()
if how == "wrong":
    print("error: no such thing", file=sys.stderr)
    sys.exit(2)
if how == "deaf" and attempt == 1:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    time.sleep(120)
if how == "slow":
    time.sleep(60)
