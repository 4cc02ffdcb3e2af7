"""``region-pretrain COMMAND``, also as ``python -m region_pretrain COMMAND``.

Only the command's own module is imported, so ``region-pretrain --help`` is fast.
"""

from __future__ import annotations

import importlib
import sys

from region_pretrain import __version__
from region_pretrain.errors import did_you_mean

PROG = "region-pretrain"

#: Command -> (module, what it does).
COMMANDS = {
    "demo": ("demo", "pre-train and fine-tune a small detector on generated images"),
    "regions": ("make_regions", "find regions in images, and write them to a region store"),
    "pretrain": ("pretrain_net", "pre-train a detector on unlabelled images"),
    "finetune": ("train_net", "fine-tune a detector on labelled images, and evaluate it"),
    "evaluate": ("evaluate", "evaluate a detector"),
    "compare": ("compare", "compare the AP of fine-tunings"),
    "probe": ("probe", "classify labelled regions from frozen features"),
    "sweep": ("sweep", "run pre-trainings and their fine-tunings, and compare them"),
    "export": ("export", "write a detector's weights for another library"),
    "check-data": ("check_data", "check data sets before training"),
    "visualize": ("visualize", "draw the views that a pre-training sees"),
    "benchmark": ("benchmark", "measure the loader and the training step of a config"),
    "benchmark-regions": ("benchmark_regions", "compare recipes of regions"),
    "completion": ("completion", "print the completion script of a shell"),
}

_TEXT = f"""\
usage: {PROG} COMMAND [arguments]
       {PROG} COMMAND --help

Region-level self-supervised pre-training of Detectron2 detectors.

commands:
{{}}

examples:
  {PROG} demo
  {PROG} regions --images DIR --out regions.arrow
  {PROG} pretrain --help"""


def overview() -> str:
    """What ``region-pretrain --help`` prints."""
    return _TEXT.format("\n".join(f"  {name:<18} {what}" for name, (_, what) in COMMANDS.items()))


def main(argv: list[str] | None = None) -> int | None:
    """Run a command; returns its exit code, of which None means success."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, otherwise=f"; see {PROG} --help")
        print(f"error: {PROG} has no command {name}{hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"region_pretrain.commands.{COMMANDS[name][0]}")
    return module.main(arguments, f"{PROG} {name}")
