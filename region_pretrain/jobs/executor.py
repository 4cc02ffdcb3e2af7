"""Submitting jobs: to SLURM, to this machine in the background, or to this shell."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.slurm.slurm import SlurmExecutor

from region_pretrain.errors import UserError
from region_pretrain.jobs.cluster import Cluster, refuse_control_characters
from region_pretrain.jobs.job import MAX_TIMEOUTS, ToolJob
from region_pretrain.jobs.slurm import outside_allocation
from region_pretrain.system import cores


def submit(
    jobs: Sequence[ToolJob],
    cluster: Cluster,
    folder: str,
    name: str,
    after: Sequence[str] = (),
) -> list[submitit.Job]:
    """Submit jobs and return at once.

    Args:
        jobs: jobs with the same ``root``. With SLURM, several jobs form one array, of which
            ``cluster.array_parallelism`` run at once.
        cluster: where to run. ``local`` starts all jobs at once, ``debug`` starts each when its
            result is requested.
        folder: for submission files, pickles and logs; must be visible to all nodes.
        name: the jobs' name in ``squeue``.
        after: SLURM only: ids of jobs that must succeed first. If one of them fails, the new jobs
            are cancelled.

    Returns:
        One submitit job per job, in order.

    Raises:
        UserError: SLURM refuses the jobs; the message quotes it.
    """
    refuse_control_characters("output folder", folder)
    os.makedirs(folder, exist_ok=True)
    root = _common_root(jobs)
    jobs = [_for_cluster(job, cluster) for job in jobs]
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    with outside_allocation(), environment_variables(PYTHONPATH=path):
        if cluster.kind != "slurm":
            local = cluster.kind == "local"
            executor = _local_executor(folder, cluster) if local else submitit.DebugExecutor(folder)
            return [executor.submit(job) for job in jobs]
        executor = _slurm_executor(SlurmExecutor, folder, cluster, name, after, root)
        try:
            return executor.submit_array(jobs) if len(jobs) > 1 else [executor.submit(jobs[0])]
        except FailedJobError as error:
            message = " ".join(str(error).replace("sbatch: error: ", "").split())
            raise UserError(f"sbatch refuses the job {name}: {message}") from error


def sbatch_text(
    jobs: Sequence[ToolJob],
    cluster: Cluster,
    folder: str,
    name: str,
    after: Sequence[str] = (),
) -> str:
    """The sbatch file that :func:`submit` would submit; does not need SLURM."""

    class DryRun(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # without looking for srun

    executor = _slurm_executor(DryRun, folder, cluster, name, after, _common_root(jobs))
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _local_executor(folder: str, cluster: Cluster) -> submitit.LocalExecutor:
    executor = submitit.LocalExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        timeout_min=cluster.time or 60 * 24 * 365,
        tasks_per_node=cluster.tasks,
        gpus_per_node=cluster.gpus_per_node or 0,
        signal_delay_s=cluster.signal_seconds,
        stderr_to_stdout=True,
        setup=list(cluster.setup),
    )
    return executor


def _slurm_executor(
    executor_class: type[SlurmExecutor],
    folder: str,
    cluster: Cluster,
    name: str,
    after: Sequence[str],
    root: str,
) -> SlurmExecutor:
    texts = {"job name": name, "output folder": folder, "code": root, "dependency": ":".join(after)}
    for what, text in texts.items():
        refuse_control_characters(what, text)
    executor = executor_class(folder, max_num_timeout=MAX_TIMEOUTS)
    cpus = cluster.cpus_per_task
    parameters = {
        "job_name": name,
        "time": cluster.time,  # even if None: submitit's own default is five minutes
        "mem": None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        "ntasks_per_node": cluster.tasks,
        "signal_delay_s": cluster.signal_seconds,
        "stderr_to_stdout": True,
        "setup": [
            *cluster.setup,
            f"export PYTHONPATH={shlex.quote(root)}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
        # The first failed task ends the step. Since SLURM 22.05 srun does not inherit
        # --cpus-per-task from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        "teardown": [
            "code=$?",
            f"[ $code -eq 0 ] || {executor.python} -m region_pretrain.jobs.requeue "
            f"{shlex.quote(str(executor.folder))} $code",
            "exit $code",
        ],
        "additional_parameters": {"requeue": True, **cluster.extra},
    }
    if after:
        parameters["dependency"] = "afterok:" + ":".join(after)
        parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    same = ("partition", "account", "qos", "constraint", "nodes", "gpus_per_node")
    same += ("cpus_per_task", "gres", "exclude", "array_parallelism")
    parameters |= {key: value for key in same if (value := getattr(cluster, key)) is not None}
    executor.update_parameters(**parameters)
    return executor


def _common_root(jobs: Sequence[ToolJob]) -> str:
    roots = {job.root for job in jobs}
    if len(roots) != 1:
        raise ValueError(f"jobs submitted together must have the same root, not {sorted(roots)}")
    return roots.pop()


def _for_cluster(job: ToolJob, cluster: Cluster) -> ToolJob:
    environment: dict[str, str | None] = {}
    if cluster.kind == "local":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None or not cluster.gpus_per_node:
            # submitit would hide all GPUs, or show the first ones.
            environment["CUDA_VISIBLE_DEVICES"] = visible
        if "OMP_NUM_THREADS" not in os.environ:
            share = len(cores()) // (cluster.jobs * cluster.tasks)
            environment["OMP_NUM_THREADS"] = str(cluster.cpus_per_task or max(1, share))
    return dataclasses.replace(
        job,
        container=cluster.container,
        environment={**environment, **job.environment},
        patience=max(5.0, cluster.signal_seconds - 30.0),
    )
