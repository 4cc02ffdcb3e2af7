#!/usr/bin/env python
"""Pre-trainings and the fine-tunings that depend on them, on this machine or on SLURM.

    tools/sweep.py --config configs/sweeps/shapes_quick.py --jobs 2    # the shell is not held
    tools/sweep.py status output/sweeps/shapes_quick
    tools/sweep.py report output/sweeps/shapes_quick
    tools/sweep.py cancel output/sweeps/shapes_quick

Started again, it runs what is missing or has failed, and nothing twice.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

from region_pretrain.errors import UserError, exit_on_user_error  # noqa: E402


def _start(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/sweeps/NAME.py")
    parser.add_argument("--cluster", choices=["local", "slurm", "debug"], help="default local")
    parser.add_argument("--jobs", type=int, help="local: jobs at once, which share the cores (1)")
    parser.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="partition=...,gpus-per-node=8,... or clusters/mine.py; implies --cluster slurm",
    )
    parser.add_argument("--wait", action="store_true", help="hold the shell, with a live table")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    parser.add_argument("opts", nargs="*", help="sweep.key=value")
    args = parser.parse_intermixed_args(argv)

    from region_pretrain.jobs.cluster import Cluster, parse_slurm
    from region_pretrain.sweeps import status, submission
    from region_pretrain.sweeps.definition import load_sweep

    kind = args.cluster or ("slurm" if args.slurm else "local")
    if args.slurm and kind != "slurm":
        raise UserError(f"--slurm and --cluster {kind}: say one of the two")
    if args.jobs is not None and kind != "local":
        raise UserError(f"--jobs is for --cluster local; with {kind} say array-parallelism=N")
    cluster = parse_slurm(args.slurm) if args.slurm else Cluster(kind=kind)
    if args.jobs is not None:
        cluster = dataclasses.replace(cluster, jobs=args.jobs)
    sweep = load_sweep(args.config, args.opts)
    planned = submission.describe(sweep, cluster, shlex.join(["python", "tools/sweep.py", *argv]))
    if args.dry_run:
        print(submission.dry_run(planned, sweep.output_dir))
        return
    submission.start(planned, sweep.output_dir)
    if args.wait:
        folder = os.path.abspath(sweep.output_dir)
        status.wait(folder)
        _report([folder])
        sys.exit(0 if status.all_finished(folder) else 1)
    else:
        print(f"see: tools/sweep.py status {sweep.output_dir}")


def _folder(argv: list[str], command: str, says: str) -> tuple[str, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog=f"sweep.py {command}", description=says)
    parser.add_argument("sweep", help="the sweep's output folder, or its file")
    parser.add_argument("opts", nargs="*", help="with a file: sweep.key=value")
    args = parser.parse_args(argv)
    if not args.sweep.endswith(".py"):
        return os.path.abspath(args.sweep), args
    from region_pretrain.sweeps.definition import load_sweep

    return os.path.abspath(load_sweep(args.sweep, args.opts).output_dir), args


def _status(argv: list[str]) -> None:
    folder, _ = _folder(argv, "status", "How far each run is.")
    from region_pretrain.sweeps.status import status_text

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # quiet where a pager or head ends first
    print(status_text(folder)[0])


def _cancel(argv: list[str]) -> None:
    folder, _ = _folder(argv, "cancel", "Stop all jobs; started again, the sweep goes on.")
    from region_pretrain.sweeps.submission import cancel

    stopped = cancel(folder)
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def _report(argv: list[str]) -> None:
    folder, _ = _folder(argv, "report", "Write report.html, report.md and results.csv.")
    from region_pretrain.sweeps.report import write_sweep_report

    for path in write_sweep_report(folder):
        print(path)


def _choose(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="sweep.py choose", description="A sweep's own step.")
    parser.add_argument("--metric", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("results", nargs="+", metavar="RATE=results.json")
    args = parser.parse_args(argv)
    from region_pretrain.sweeps.choice import choose

    print(choose(dict(text.split("=", 1) for text in args.results), args.metric, args.out))


@exit_on_user_error
def main() -> None:
    commands = {"status": _status, "cancel": _cancel, "report": _report, "choose": _choose}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        commands[name](sys.argv[2:])
    else:
        _start(sys.argv[1:])


if __name__ == "__main__":
    main()
