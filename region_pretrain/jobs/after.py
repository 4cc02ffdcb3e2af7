"""What a job's batch script runs when ``srun`` has failed: requeue what nobody wanted to end.

python -m region_pretrain.jobs.after FOLDER EXIT_CODE
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from region_pretrain.jobs.attempts import end_attempt
from region_pretrain.jobs.rendezvous import job_state, restart_count


def find_killed(notes: list[dict]) -> dict | None:
    """The note of a task that was killed; None where none was.

    Args:
        notes: the newest note of each task. ``running`` is left by one that could not even say
            that it ends; those that end for another's sake are ``told`` by SLURM first.
    """
    return next((note for note in notes if note["state"] in ("killed", "running")), None)


def find_told(notes: list[dict]) -> dict | None:
    """A note where SLURM told every task to end before they could agree to stop; else None.

    That is a job which is cancelled, or one whose step SLURM gives up, as when a node or ``srun``
    does not answer in time: the job itself then runs on.
    """
    told = notes and all(note["state"] == "told" for note in notes)
    return notes[0] if told else None


def main() -> None:
    folder, code = Path(sys.argv[1]), int(sys.argv[2])
    job_id = os.environ["SLURM_JOB_ID"]
    name = job_id
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    paths = sorted(folder.glob(f"tasks/{name}_{restart_count()}_*.json"))
    notes = [json.loads(path.read_text()) for path in paths]
    if (ended := find_killed(notes)) is not None:
        by = f"by signal {ended['code']}" if ended["code"] else f"(srun's exit code: {code})"
        what = f"a process was killed {by}"
    elif (ended := find_told(notes)) is not None and job_state(name) == "RUNNING":
        what = f"SLURM ended its step (srun's exit code: {code})"
    else:
        return
    end_attempt(ended["output_dir"], "killed")
    print(f"job {name}: {what}; it is requeued", flush=True)
    subprocess.run(["scontrol", "requeue", name], check=True, timeout=120)


if __name__ == "__main__":
    main()
