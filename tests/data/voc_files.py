"""Small data sets in Pascal VOC's layout."""

from pathlib import Path

import cv2
import numpy as np

XML = """<annotation><size><width>64</width><height>48</height></size>{}</annotation>"""
OBJECT = """<object><name>{}</name><pose>x</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def make_voc(root: Path, classes: list[str], splits: dict[str, list[int]]) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for split, numbers in splits.items():
        (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{n:06d}\n" for n in numbers))
        for n in numbers:
            objects = []
            for k in range(2):
                (x, y), (w, h) = rng.integers(1, 20, 2), rng.integers(12, 28, 2)
                objects.append(OBJECT.format(classes[(n + k) % len(classes)], x, y, x + w, y + h))
            (root / f"Annotations/{n:06d}.xml").write_text(XML.format("".join(objects)))
            cv2.imwrite(str(root / f"JPEGImages/{n:06d}.jpg"), np.full((48, 64, 3), 9, np.uint8))
    return root
