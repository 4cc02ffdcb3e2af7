"""Boxes in CSV files."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow as pa
import pyarrow.csv
from detectron2.utils.file_io import PathManager

from region_pretrain.regions.elsewhere.table import BoxTable, errors_name

_CORNERS = ("x0", "y0", "x1", "y1")
_IMAGES = ("file_name", "image_id")


def header_of(path: str) -> list[str]:
    """The columns that the first line of a text names; empty if it cannot be one of boxes."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            line = next(csv.reader([file.readline(1 << 16)]), [])
    except (UnicodeDecodeError, csv.Error):
        return []
    return line if set(_CORNERS) <= set(line) else []


def read_csv(path: str) -> BoxTable:
    """Read lines of ``file_name,x0,y0,x1,y1,score``.

    The header may list the columns in any order, and others, which are ignored. ``score`` is
    optional; ``image_id`` may replace ``file_name``.

    Raises:
        UserError: the file is damaged or in another format.
    """
    with errors_name(path, "a CSV file of boxes"):
        path = PathManager.get_local_path(path)
        header = header_of(path)
        image = next((name for name in _IMAGES if name in header), None)
        if image is None:
            raise ValueError("its header must be file_name,x0,y0,x1,y1 or that and ,score")
        scored = [name for name in ("score",) if name in header]
        kinds = dict.fromkeys([*_CORNERS, *scored], pa.float64())
        kinds[image] = pa.dictionary(pa.int32(), pa.string())
        table = pa.csv.read_csv(
            path,
            convert_options=pa.csv.ConvertOptions(column_types=kinds, include_columns=list(kinds)),
        ).unify_dictionaries()
        column = table[image].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # of no lines
            column = pa.concat_arrays(column.chunks) if column.num_chunks else None
        names = [] if column is None else column.dictionary.to_pylist()
        rows = np.zeros(0, np.int32) if column is None else column.indices.to_numpy()
        if column is not None and (column.null_count or "" in names):
            raise ValueError(f"a line has no {image}")
        boxes = np.stack([table[name].to_numpy() for name in _CORNERS], axis=1)
        scores = table["score"].to_numpy() if scored else None
        return BoxTable.of(names, image == "image_id", rows, boxes, scores)
