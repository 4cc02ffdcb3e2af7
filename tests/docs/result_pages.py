"""Committed rows, and tables on pages."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CSV = ROOT / "docs/results/shapes_long.csv"
STEPS = ROOT / "docs/results/shapes_steps.csv"
NAMES = {
    "SoCo": "soco", "MCL": "mcl", "CCOP": "ccop", "Point-level region contrast": "point",
    "BYOL": "byol", "MoCo v2": "moco",
}  # fmt: skip


def table(text, *header):
    """Cells of the first table whose header starts with the given names."""
    start = text.index("| " + " | ".join(header))
    lines = text[start:].split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines]
