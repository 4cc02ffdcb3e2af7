"""docs/notebook.ipynb runs, and its committed outputs are small and clean."""

import json
from pathlib import Path

import nbformat
import pytest
from forked import LONG
from nbclient import NotebookClient

from region_pretrain.metrics import read_metrics

NOTEBOOK = Path(__file__).parents[2] / "docs/notebook.ipynb"
SIZES = {
    "IMAGES, LABELLED, VAL = 160, 100, 50": "IMAGES, LABELLED, VAL = 16, 8, 4",
    "PRETRAIN_STEPS, FINETUNE_STEPS = 30, 80": "PRETRAIN_STEPS, FINETUNE_STEPS = 2, 3",
    "CPU = [": 'CPU = ["train.log_period=1", ',
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run with few images and steps, and the folder of the run."""
    notebook, folder = nbformat.read(NOTEBOOK, 4), tmp_path_factory.mktemp("notebook")
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for old, new in SIZES.items():
        assert first.source.count(old) == 1, old
        first.source = first.source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder / "datasets"))
        patch.setenv("OMP_NUM_THREADS", "1")
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=LONG, resources=resources).execute()
    return notebook, folder


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def pictures(notebook):
    return sum(
        any(kind.startswith("image/") for kind in output.get("data", {}))
        for output in outputs(notebook)
    )


def test_the_notebook_runs_from_regions_to_detections(executed):
    notebook, folder = executed
    assert not [o for o in outputs(notebook) if o.output_type == "error"]
    assert pictures(notebook) == 4
    text = "".join(o.text for o in outputs(notebook) if o.get("name") == "stdout")
    assert "images: 16, and 0 unreadable files skipped" in text
    rows = read_metrics(str(folder / "output/pretrain"))
    assert [row["iteration"] for row in rows] == [0, 1]
    spread = [round(row["embedding_std"], 2) for row in rows]
    assert f"collapsed): {spread}" in text and all(0.3 < value < 1.1 for value in spread)
    rows = read_metrics(str(folder / "output/finetune"))
    assert [row["iteration"] for row in rows if "loss_mask" in row] == [0, 1, 2]
    saved = json.loads((folder / "output/finetune/results.json").read_text())
    assert json.loads((folder / "output/finetune/results_eval.json").read_text()) == saved
    shown = {task: round(values["AP50"], 1) for task, values in saved.items()}
    assert repr(shown) in [o.data.get("text/plain") for o in outputs(notebook) if "data" in o]


def test_the_committed_outputs_are_small_and_complete():
    notebook = nbformat.read(NOTEBOOK, 4)
    assert NOTEBOOK.stat().st_size < 500_000 and pictures(notebook) == 4
    assert {o.get("name") for o in outputs(notebook)} <= {"stdout", None}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "/tmp" not in "".join(o.get("text", "") for o in outputs(notebook))
