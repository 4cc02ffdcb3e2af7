"""Run by a job's batch script when ``srun`` fails: requeue the job unless it failed by itself.

A job that stopped at its limit is requeued by its first process. Where SLURM did not answer that
one, it is asked again here, for a minute.

python -m region_pretrain.jobs.requeue FOLDER EXIT_CODE
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmJobEnvironment

from region_pretrain.errors import exit_on_user_error
from region_pretrain.jobs import slurm
from region_pretrain.jobs.attempts import MAX_STALLED, end_attempt
from region_pretrain.json_files import read_json


@exit_on_user_error
def main() -> None:
    """Requeue a job of which a process was killed, or whose step SLURM gave up."""
    folder, code = Path(sys.argv[1]), sys.argv[2]
    job = SlurmJobEnvironment().job_id
    paths = sorted(folder.glob(f"tasks/{job}_{slurm.restart_count()}_*.json"))
    # The last note of each task.
    notes = [read_json(str(path), dict[str, Any], "the job is not requeued") for path in paths]
    # A task that still counts as running was killed itself, before it could write another note.
    killed = [note for note in notes if note["state"] in ("killed", "running")]
    if any(note["state"] == "failed" for note in notes):  # then NCCL aborts the other tasks
        killed = [note for note in killed if note["code"] != signal.SIGABRT]

    def still_runs() -> bool:
        return slurm.patiently(lambda: slurm.job_state(job)) == "RUNNING"

    if not notes and int(code) > 128 and slurm.restart_count() < MAX_STALLED:
        reason = f"a process was killed by signal {int(code) - 128} before it could start"
    elif killed:
        by = f"by signal {killed[0]['code']}" if killed[0]["code"] else f"(srun exit code {code})"
        reason = f"a process was killed {by}"
    # SLURM terminated all tasks before they agreed to stop. Either the job was cancelled, or SLURM
    # gave up its step, as when a node or srun does not answer: then the job still runs.
    elif notes and all(note["state"] == "signalled" for note in notes) and still_runs():
        reason = f"SLURM ended its step (srun exit code {code})"
    elif any(note["state"] == "stopped" for note in notes) and still_runs():
        reason = "it stopped, and could not requeue itself"
    else:
        return
    if notes and not any(note["state"] == "stopped" for note in notes):
        end_attempt(notes[0]["output_dir"], "killed")
    print(f"job {job}: {reason}; requeueing", flush=True)
    slurm.patiently(lambda: slurm.requeue(job))


if __name__ == "__main__":
    main()
