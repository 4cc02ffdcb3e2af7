"""Rows of initialisations of which runs have failed, or have found nothing: visible everywhere."""

from pathlib import Path

import pytest
from report_folder import Folder

from region_pretrain.sweeps import figures, results, state
from region_pretrain.sweeps.rows import METRICS, Row
from region_pretrain.sweeps.tables import tables


def row(init, labels, *values, wanted=None):
    """Box AP, or None, of the fine-tuning seeds."""
    made = Row(init, init.upper(), init, "det", labels / 100, "final", labels, images_seen=0)
    made.by_seeds = {(None, i): dict.fromkeys(METRICS, ap) for i, ap in enumerate(values)}
    made.wanted = wanted or len(values)
    return made


def table(rows, start):
    return next(t for t in tables(rows, {}) if t.caption.startswith(start))


def test_a_detector_that_found_nothing_is_named():
    rows = [row("random", 100, 10.0, 12.0), row("moco", 100, 20.0, None)]
    found = table(rows, "Box and mask AP")
    assert found.caption.endswith(
        "MOCO: no mean, as the detector of 1 of 2 fine-tunings found nothing."
    )
    assert found.rows[1][1:4] == ["2", "–", "–"]
    complete = table([row("random", 100, 10.0), row("moco", 100, 20.0)], "Box and mask AP")
    assert "found nothing" not in complete.caption
    for row_ in rows:  # a detector without masks
        for values in row_.by_seeds.values():
            values |= {key: None for key in values if key.startswith("segm/")}
    boxes = table(rows, "Box and mask AP").caption
    assert boxes == found.caption
    assert "found nothing" not in table(rows[:1], "Box and mask AP").caption


def test_no_detector_found_anything():
    rows = [row("random", 100, None, None), row("moco", 100, None)]
    found = table(rows, "Box and mask AP")
    assert found.header[3:5] == ["box AP", "box AP50"] and found.rows[0][3:5] == ["–", "–"]
    for name, lost in (("RANDOM", "2 of 2"), ("MOCO", "1 of 1")):
        assert f"{name}: no mean, as the detector of {lost} fine-tunings" in found.caption
    assert table(rows, "Difference from").rows[0][:3] == ["MOCO", "1", "–"]


def test_label_counts_of_unfinished_runs():
    rows = [row("random", n, 10.0 + n, 11.0 + n) for n in (50, 100)]
    rows += [row("moco", 50, 60.0, wanted=2), row("moco", 100, wanted=2)]
    found = table(rows, "By number of labelled images: box AP")
    assert found.rows == [
        ["RANDOM", "60.5 ± 0.7", "110.5 ± 0.7"],
        ["MOCO", "60.0 (n = 1/2)", "–"],
    ]


def test_an_unfinished_row_has_the_label_count_of_the_others(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    monkeypatch.setattr(
        results, "_labelled_images", lambda run, known: 7 if "_1.0_" in run.name else 3
    )
    monkeypatch.setattr(
        state, "is_finished", lambda run: "mcl_1.0" not in run.name and Path(run.product).exists()
    )
    rows = results.collect(state.read_sweep(str(folder.root)))
    assert {(r.init, r.label_fraction): r.labels for r in rows} == {
        (init, fraction): {1.0: 7, 0.1: 3}[fraction]
        for init in ("random", "soco", "mcl")
        for fraction in (1.0, 0.1)
    }
    assert not next(r for r in rows if (r.init, r.label_fraction) == ("mcl", 1.0)).by_seeds


@pytest.mark.parametrize("finished", [True, False])
def test_a_curve_without_points_is_in_the_legend(monkeypatch, finished):
    drawn = []
    monkeypatch.setattr(figures, "plot_curves", lambda curves, *_, **__: drawn.append(curves))
    ours = [(50, 20.0), (100, 30.0)] if finished else [(50,), (100,)]
    figures.figures(
        [row("random", *values, wanted=1) for values in ours]
        + [row("moco", n, wanted=1) for n in (50, 100)]
    )
    expected = {"RANDOM": ([50, 100], [20.0, 30.0]), "MOCO": ([], [])}
    assert drawn == ([expected] * 2 if finished else [])  # box and mask AP
