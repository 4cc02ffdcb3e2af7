"""Run pre-trainings and the fine-tunings that depend on them, on this machine or on SLURM.

    %(prog)s --config configs/sweeps/shapes_quick.py --jobs 2

The command returns immediately, unless --wait is given. Started again, a sweep runs what is
missing or has failed, and nothing twice.
"""

import argparse
import dataclasses
import os
import shlex
import sys

from region_pretrain.commands import program, text_parser
from region_pretrain.errors import UserError, exit_on_user_error

_COMMANDS = """\
commands for a sweep that was started (SWEEP is its output folder, or its config file):
  %(prog)s status SWEEP   print the state of every run, and why runs failed
  %(prog)s report SWEEP   write report.html, report.md and results.csv
  %(prog)s cancel SWEEP   stop all jobs; they resume when the sweep is started again
  %(prog)s probes SWEEP   probe all checkpoints; which probe predicts the fine-tuned AP?
  %(prog)s zoo SWEEP      write weights and cards of the pre-trainings, for zoo://NAME

command for a results.csv, without the runs:
  %(prog)s tables CSV     write its tables and figures
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line that starts a sweep."""
    parser = text_parser(prog, __doc__)
    parser.epilog = _COMMANDS
    parser.usage = (
        "%(prog)s --config FILE [options] [sweep.key=value ...]\n"
        "       %(prog)s {status,report,cancel,probes,zoo} SWEEP\n"
        "       %(prog)s tables CSV --out DIR [--reference NAME ...]"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configs/sweeps/NAME.py")
    parser.add_argument(
        "--cluster",
        choices=["local", "slurm", "debug"],
        help="where jobs run; debug: one after the other, in this process (default: local)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="local: number of jobs that run at once and share the CPU cores (default: 1)",
    )
    parser.add_argument(
        "--gpus-per-job",
        type=int,
        metavar="N",
        help="local: GPUs of each training, with one process per GPU (default: 1)",
    )
    parser.add_argument(
        "--gpus-per-finetuning",
        type=int,
        metavar="N",
        help="local: GPUs of each fine-tuning, of which more run at once if it has fewer than the "
        "pre-trainings (default: those of each training)",
    )
    parser.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="partition=...,gpus-per-node=8,... or clusters/mine.py; implies --cluster slurm",
    )
    parser.add_argument(
        "--wait", action="store_true", help="show progress until the end, then the results"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "opts", nargs="*", metavar="sweep.key=value", help="overrides of the config"
    )
    return parser


def _start(argv: list[str], prog: str) -> None:
    args = make_parser(prog).parse_intermixed_args(argv)

    from region_pretrain.jobs.cluster import Cluster, parse_slurm
    from region_pretrain.sweeps import status, submission
    from region_pretrain.sweeps.definition import load_sweep

    # submitit's local jobs need POSIX signals and sessions.
    here = "local" if os.name == "posix" else "debug"
    kind = args.cluster or (here if args.slurm is None else "slurm")
    if args.slurm is not None and kind != "slurm":
        raise UserError(f"--slurm and --cluster {kind} contradict each other: give one of them")
    if args.jobs is not None and kind != "local":
        raise UserError(
            f"--jobs works with --cluster local only; for {kind}, use --slurm array-parallelism=N"
        )
    _check_gpus("--gpus-per-job", args.gpus_per_job, kind, "gpus-per-node=N")
    _check_gpus("--gpus-per-finetuning", args.gpus_per_finetuning, kind, "finetune.gpus-per-node=N")
    cluster = Cluster(kind=kind) if args.slurm is None else parse_slurm(args.slurm)
    if args.jobs is not None:
        cluster = dataclasses.replace(cluster, jobs=args.jobs)
    if args.gpus_per_job is not None:
        cluster = dataclasses.replace(cluster, gpus_per_node=args.gpus_per_job)
    if args.gpus_per_finetuning is not None:
        own = {"gpus_per_node": args.gpus_per_finetuning}
        cluster = dataclasses.replace(cluster, finetune=own)
    sweep = load_sweep(args.config, args.opts)
    planned = submission.describe(sweep, cluster, f"{prog} {shlex.join(argv)}")
    if args.dry_run:
        print(submission.dry_run(planned, sweep.output_dir))
        return
    submission.start(planned, sweep.output_dir)
    if not args.wait:
        print(f"follow it with: {prog} status {sweep.output_dir}")
        return
    from region_pretrain.sweeps.report import results_text, write_sweep_report

    folder = os.path.abspath(sweep.output_dir)
    try:
        status.wait(folder)
    except KeyboardInterrupt:
        print(f"\nthe sweep continues; to stop it: {prog} cancel {sweep.output_dir}")
        sys.exit(130)
    print(f"\n{results_text(folder)}\n")
    print(*write_sweep_report(folder), sep="\n")
    sys.exit(0 if status.all_finished(folder) else 1)


def _check_gpus(option: str, number: int | None, kind: str, setting: str) -> None:
    from region_pretrain.system import gpus

    if number is None:
        return
    if kind != "local":
        raise UserError(
            f"{option} works with --cluster local only; for {kind}, use --slurm {setting}"
        )
    count = len(gpus())
    if not 1 <= number <= count:
        raise UserError(f"{option} {number}: this machine has {count} GPUs")


def _sweep_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of what names a sweep, see :func:`_folder_of`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("sweep", help="the sweep's output folder, or its config file")
    parser.add_argument("opts", nargs="*", help="with a config file: sweep.key=value")
    return parser


def _folder(argv: list[str], prog: str, description: str) -> str:
    return _folder_of(_sweep_parser(prog, description).parse_args(argv))


def _folder_of(args: argparse.Namespace) -> str:
    if not args.sweep.endswith(".py"):
        return os.path.abspath(args.sweep)
    from region_pretrain.sweeps.definition import load_sweep

    return os.path.abspath(load_sweep(args.sweep, args.opts).output_dir)


def _status(argv: list[str], prog: str) -> None:
    folder = _folder(argv, prog, "Print the state of every run, and why runs failed.")
    from region_pretrain.files import reported_if_stuck
    from region_pretrain.sweeps.status import status_text

    with reported_if_stuck(folder, 10):
        text, _ = status_text(folder)
    print(text)


def _cancel(argv: list[str], prog: str) -> None:
    folder = _folder(argv, prog, "Stop all jobs; they resume when the sweep is started again.")
    from region_pretrain.sweeps.submission import cancel

    stopped = cancel(folder)
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


def _report(argv: list[str], prog: str) -> None:
    folder = _folder(argv, prog, "Write report.html, report.md and results.csv.")
    from region_pretrain.sweeps.report import write_sweep_report

    print(*write_sweep_report(folder), sep="\n")


def _probes(argv: list[str], prog: str) -> None:
    parser = _sweep_parser(
        prog,
        "Probe the pre-trainings that have been fine-tuned, as tools/probe.py does, and print the "
        "rank correlation of each probe with the AP. Other fine-tunings of the sweep, e.g. a short "
        "one with a frozen trunk, count as probes.",
    )
    parser.add_argument(
        "--finetune", metavar="NAME", help="fine-tuning to predict (default: first)"
    )
    parser.add_argument("--metric", default="bbox/AP", help="its metric (default %(default)s)")
    parser.add_argument("--out", metavar="CSV", help="file (default: SWEEP/probes.csv)")
    args = parser.parse_intermixed_args(argv)
    from region_pretrain.files import make_writable, write_text_atomic
    from region_pretrain.sweeps.probes import probe_checkpoints, probes_csv, rank_correlations

    folder = _folder_of(args)
    out = args.out or os.path.join(folder, "probes.csv")
    if args.out:  # a mistyped sweep folder is not created
        make_writable(os.path.dirname(out), "the folder of --out")
    found = probe_checkpoints(folder, args.finetune, args.metric)
    write_text_atomic(out, probes_csv(found))
    print(f"{rank_correlations(found)}\n\n{out}")


def _choose(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Choose the best learning rate; a sweep runs this between trials and results.",
    )
    parser.add_argument("--metric", required=True, help="task/metric, e.g. bbox/AP")
    parser.add_argument("--out", required=True, help="file to write the override to")
    parser.add_argument("results", nargs="+", metavar="LEARNING_RATE=results.json")
    args = parser.parse_args(argv)
    from region_pretrain.sweeps.choice import choose

    print(choose([text.split("=", 1) for text in args.results], args.metric, args.out))


def _zoo(argv: list[str], prog: str) -> None:
    parser = _sweep_parser(
        prog,
        "Write the weights of a sweep's pre-trainings, and metafile.yml with their cards. "
        "zoo://NAME then stands for them wherever weights are loaded.",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: output/zoo)")
    args = parser.parse_intermixed_args(argv)
    from region_pretrain.sweeps.zoo import write_zoo
    from region_pretrain.zoo import DEFAULT_FOLDER

    print(*write_zoo(_folder_of(args), args.out or DEFAULT_FOLDER), sep="\n")


def _tables(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write tables (Markdown) and figures (PNG) of a sweep's results.csv.",
    )
    parser.add_argument("csv", metavar="CSV", help="results.csv of a sweep, or a renamed copy")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME",
        help="initialisation to compare the others with, e.g. random; may be given several times "
        "(default: the first one without pre-training)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    args = parser.parse_args(argv)
    from region_pretrain.sweeps.report import write_tables

    print(*write_tables(args.csv, args.reference, args.out), sep="\n")


_SUBCOMMANDS = {
    "status": _status,
    "cancel": _cancel,
    "report": _report,
    "tables": _tables,
    "probes": _probes,
    "choose": _choose,
    "zoo": _zoo,
}


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Start a sweep, or run one of the sub-commands."""
    argv = sys.argv[1:] if argv is None else argv
    prog = prog or f"python {program(prog)}"
    command = _SUBCOMMANDS.get(argv[0]) if argv else None
    if command is not None:
        command(argv[1:], f"{prog} {argv[0]}")
    else:
        _start(argv, prog)
