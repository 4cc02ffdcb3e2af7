"""What a job's batch script runs when ``srun`` has failed: requeue it if a process was killed.

python -m region_pretrain.launch.after FOLDER EXIT_CODE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from region_pretrain.launch.attempts import end_attempt
from region_pretrain.launch.rendezvous import restart_count


def find_killed(notes: list[dict]) -> dict | None:
    """The note of a task that was killed; None where none was.

    Args:
        notes: the newest note of each task. ``running`` is left by one that could not even say
            that it ends; those that end for another's sake are ``told`` by SLURM first.
    """
    return next((note for note in notes if note["state"] in ("killed", "running")), None)


def main() -> None:
    folder, code = Path(sys.argv[1]), int(sys.argv[2])
    job_id = os.environ["SLURM_JOB_ID"]
    name = job_id
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    paths = sorted(folder.glob(f"tasks/{name}_{restart_count()}_*.json"))
    killed = find_killed([json.loads(path.read_text()) for path in paths])
    if killed is None:
        return
    end_attempt(killed["output_dir"], "killed")
    what = f"by signal {killed['code']}" if killed["code"] else f"(srun's exit code: {code})"
    print(f"job {name}: a process was killed {what}; it is requeued", flush=True)
    subprocess.run(["scontrol", "requeue", name], check=True, timeout=120)


if __name__ == "__main__":
    main()
