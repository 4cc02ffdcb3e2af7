"""The ``--slurm`` option, with which a tool submits itself as a job."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from region_pretrain.config import to_yaml
from region_pretrain.engine.command_line import config_of
from region_pretrain.engine.output_dir import refuse_existing_run
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.jobs import slurm
from region_pretrain.jobs.cluster import Cluster, check_cluster, parse_slurm
from region_pretrain.jobs.executor import sbatch_text, submit
from region_pretrain.jobs.job import ToolJob
from region_pretrain.jobs.snapshot import packages_of, take_snapshot
from region_pretrain.shipped import ROOT


def add_slurm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--slurm`` and ``--dry-run``."""
    group = parser.add_argument_group("SLURM")
    group.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="submit to SLURM instead of running here, e.g. "
        "partition=gpu,nodes=2,gpus-per-node=8,time=24:00:00; or a settings file with "
        "overrides: clusters/mine.py,nodes=2",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="with --slurm: print the sbatch file and exit"
    )


def wants_slurm(args: argparse.Namespace) -> bool:
    """Whether to submit the command instead of running it.

    Raises:
        UserError: ``--dry-run`` without ``--slurm``.
    """
    if args.dry_run and args.slurm is None:
        raise UserError("--dry-run shows what --slurm would submit: give both")
    return args.slurm is not None


def submit_training(args: argparse.Namespace, tool: str) -> None:
    """Submit a pre-training, fine-tuning or evaluation run.

    The config and its overrides are saved now, so that later edits do not affect the queued job.

    Args:
        args: the parsed command line of ``tools/pretrain_net.py`` or ``tools/train_net.py``.
        tool: ``tools/NAME.py``.

    Raises:
        UserError: invalid arguments; nothing has been submitted.
    """
    if args.num_gpus != 1 or args.num_machines != 1 or args.dist_url != "auto":
        raise UserError(
            "--num-gpus, --num-machines and --dist-url do not apply with --slurm: use "
            "--slurm nodes=N,gpus-per-node=M"
        )
    cluster = parse_slurm(args.slurm)
    cfg = config_of(args)
    check_batch(cfg, cluster)
    text = to_yaml(cfg)
    output_dir = cfg.train.output_dir
    if not args.resume and not args.eval_only:
        refuse_existing_run(output_dir)
    folder = os.path.join(output_dir, "slurm")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    config = os.path.abspath(os.path.join(folder, f"config-{digest}.yaml"))
    job = ToolJob(
        tool=tool,
        arguments=[*(["--eval-only"] if args.eval_only else []), "--config-file", config],
        output_dir=output_dir,
        root=str(ROOT),
        resume="" if args.eval_only else "--resume",
    )
    _submit([job], cluster, folder, output_dir, args.dry_run, {config: text})


def submit_shards(args: argparse.Namespace, arguments: Sequence[str], out: str) -> None:
    """Submit a job array with one job per shard.

    Args:
        args: parsed command line with ``slurm``, ``dry_run`` and ``shards``.
        arguments: arguments of ``tools/make_regions.py`` common to all shards.
        out: the output file; the array's own files are in ``<out>.slurm``.

    Raises:
        UserError: invalid arguments; nothing has been submitted.
    """
    if args.shards < 1:
        raise UserError(f"--shards {args.shards}: must be at least 1")
    cluster = parse_slurm(args.slurm)
    if cluster.nodes * cluster.tasks > 1:
        raise UserError(
            "--slurm: each shard is a job of one process; use --shards N for more jobs, and "
            "cpus-per-task for more cores per job"
        )
    folder = f"{out}.slurm"
    jobs = [
        ToolJob(
            tool="tools/make_regions.py",
            arguments=[*arguments, "--shard", f"{i}/{args.shards}"],
            output_dir=os.path.join(folder, f"shard{i}"),
            root=str(ROOT),
            resume="",
            parts=os.path.abspath(f"{out}.parts"),
        )
        for i in range(args.shards)
    ]
    _submit(jobs, cluster, folder, out, args.dry_run, {})


def _submit(
    jobs: list[ToolJob],
    cluster: Cluster,
    folder: str,
    output: str,
    dry_run: bool,
    files: Mapping[str, str],
) -> None:
    name = os.path.basename(os.path.abspath(output))
    script = sbatch_text(jobs, cluster, folder, name)  # refuses what may not be in it
    if dry_run:
        print(script, end="")
        return
    check_cluster(cluster)
    os.makedirs(folder, exist_ok=True)
    _refuse_queued(folder, output)
    for path, text in files.items():
        write_text_atomic(path, text)
    root = take_snapshot(folder, packages_of("\n".join(files.values())))
    for job in jobs:
        job.root = root
    submitted = submit(jobs, cluster, folder, name)
    ids = [job.job_id for job in submitted]
    shown = ids[0] if len(ids) == 1 else f"{ids[0]} ... {ids[-1]}"
    print(f"submitted {shown}; log: {submitted[0].paths.stdout}\ncode: {root}")


def check_batch(cfg: DictConfig, cluster: Cluster) -> None:
    """Refuse a batch that a job's processes cannot share.

    Raises:
        UserError: ``dataloader.train.total_batch_size`` is no multiple of their number.
    """
    total = cfg.get("dataloader", {}).get("train", {}).get("total_batch_size")
    ranks = cluster.nodes * cluster.tasks
    if isinstance(total, int) and total % ranks:
        raise UserError(
            f"dataloader.train.total_batch_size={total} must be a multiple of the {ranks} "
            f"processes (nodes={cluster.nodes}, {cluster.tasks} tasks per node)"
        )


def _refuse_queued(folder: str, output: str) -> None:
    """Two jobs must not write to one folder."""
    names = os.listdir(folder)
    ids = {match[1] for name in names if (match := re.match(r"(\d+)(_\d+)?_submitted\.pkl$", name))}
    if not ids:
        return
    if queued := sorted(ids.intersection(job.partition("_")[0] for job in slurm.jobs_of())):
        raise UserError(
            f"job {queued[0]} for {output} is still in the queue: wait for it, or run "
            f"scancel {queued[0]}"
        )
