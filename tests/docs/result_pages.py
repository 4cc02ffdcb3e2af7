"""Committed rows, and tables on pages."""

import re
from pathlib import Path

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.rows import read_csv

ROOT = Path(__file__).parents[2]
CSV = ROOT / "docs/results/shapes_long.csv"
STEPS = ROOT / "docs/results/shapes_steps.csv"
TUNED = ROOT / "docs/results/shapes_tuned.csv"
LENGTHS = ROOT / "docs/results/shapes_four_times.csv"
CHOSEN = ROOT / "docs/results/shapes_chosen.csv"
NAMES = {
    "SoCo": "soco", "MCL": "mcl", "CCOP": "ccop", "Point-level region contrast": "point",
    "BYOL": "byol", "MoCo v2": "moco",
}  # fmt: skip


def section(title, path="docs/benchmark.md"):
    """A section of a page, with its subsections."""
    text = (ROOT / path).read_text()
    (found,) = re.finditer(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    end = re.search(rf"^#{{1,{len(found[1])}}} ", text[found.end() :], re.MULTILINE)
    return text[found.start() : found.end() + end.start() if end else None]


def table(text, *header):
    """Cells of the first table whose header starts with the given names."""
    start = text.index("| " + " | ".join(header))
    lines = text[start:].split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines]


def row_of(path, init):
    """The only row of an initialisation in a file."""
    (row,) = (row for row in read_csv(str(path)) if row.init == init)
    return row


def steps_900(init, key="bbox/AP"):
    """Fine-tunings with 900 steps: with its Shapes config's learning rate, or with a chosen one."""
    return row_of(TUNED if init.endswith("_twice") else STEPS, init).values(key)


def tuned(init, key="bbox/AP"):
    """Fine-tunings with 900 steps on one processor, with the chosen learning rate."""
    return row_of(TUNED, init).values(key)


def run_cells(values, seeds, beside):
    """Cells of a table of runs: AP by fine-tuning seed, one cell per pre-training.

    Args:
        values: seeds -> AP.
        seeds: of the pre-trainings.
        beside: maps one to a part of the machine's name, for runs without pre-training.
    """
    cells = []
    for seed in seeds:
        found = sorted(
            (finetune, value)
            for (pretrain, finetune, machine), value in values.items()
            if pretrain == seed or (pretrain is None and beside(seed) in machine)
        )
        cells.append(", ".join(f"{value:.1f}" for _, value in found) or "–")
    return cells


def difference_cells(values, references):
    """Cells of a table of differences: mean, interval, and how many pairs are positive."""
    cells = []
    for reference in references:
        if reference == values:
            cells.append("–")
            continue
        pairs = pair(values, reference)
        above = sum(value > 0 for value in pairs.values())
        cells.append(f"{difference(pairs)} ({above}/{len(pairs)})")
    return cells
