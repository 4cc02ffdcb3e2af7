"""What is wrong, or unusual, in a data set: counted, with one example of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.structures import BoxMode


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or unusual, in a data set.

    Attributes:
        what: what was found and what was done about it.
        count: how often.
        example: the first annotation, image or category concerned.
        fixed: whether the data differ from the file because of it.
    """

    what: str
    count: int
    example: str
    fixed: bool = True

    def __str__(self) -> str:
        return f"{self.count} x {self.what} (e.g. {self.example})"


class Findings:
    """Counts findings, keeping the first example of each."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, bool], list] = {}

    def add(self, what: str, example: object, fixed: bool = True) -> None:
        """Count one more."""
        self._found.setdefault((what, fixed), [0, str(example)])[0] += 1

    def list(self) -> list[Finding]:
        """All findings, in the order of their first example."""
        return [Finding(what, n, e, fixed) for (what, fixed), (n, e) in self._found.items()]


def id_key(value: Any) -> str | None:
    """The same text for 7, 7.0 and "7"; None for what cannot be an id."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return str(value).strip() or None


def box_findings(records: Sequence[Mapping]) -> list[Finding]:
    """Boxes of Detectron2 records that are empty or leave their image; these are only counted."""
    findings = Findings()
    for record in records:
        for annotation in record.get("annotations", ()):
            if len(annotation["bbox"]) != 4:
                continue  # a rotated box
            box = list(map(float, annotation["bbox"]))
            x0, y0, x1, y1 = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
            width, height = (record.get(key, float("inf")) for key in ("width", "height"))
            if x1 <= x0 or y1 <= y0:
                findings.add("empty box", record["file_name"], fixed=False)
            elif min(x1, y1, width - x0, height - y0) <= 0:
                findings.add("box outside of its image", record["file_name"], fixed=False)
            elif max(-x0, -y0, x1 - width, y1 - height) > 1:
                findings.add("box that reaches out of its image", record["file_name"], fixed=False)
    return findings.list()
