"""Committed rows, and tables on pages."""

import re
from pathlib import Path

from region_pretrain.sweeps.rows import read_csv

ROOT = Path(__file__).parents[2]
CSV = ROOT / "docs/results/shapes_long.csv"
STEPS = ROOT / "docs/results/shapes_steps.csv"
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


def steps_900(init, key="bbox/AP", labels=100, seeds=(4, 5, 6, 7)):
    """Fine-tunings with 900 steps of these pre-trainings, or of random weights beside them."""
    (row,) = (
        r
        for r in read_csv(str(STEPS))
        if (r.init, r.finetune, r.labels) == (init, "steps900", labels)
    )
    found = row.values(key)
    return {k: v for k, v in found.items() if k[0] in seeds or (k[0] is None and "AVX512" in k[2])}
