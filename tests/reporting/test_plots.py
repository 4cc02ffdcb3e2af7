"""Curves from metrics.json."""

import json

import cv2
import numpy as np
import pytest

from region_pretrain.errors import UserError
from region_pretrain.metrics import read_metrics
from region_pretrain.reporting import plots
from region_pretrain.reporting.plots import colours, metric_curve, plot_curves, plot_points


def rgb(names) -> list[np.ndarray]:
    return [np.round(255 * np.array(colour)).astype(int) for colour in colours(names).values()]


def decode(png: bytes) -> np.ndarray:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.fixture
def run(tmp_path):
    lines = [
        json.dumps({"iteration": 19, "total_loss": 3.0, "lr": 0.1}),
        json.dumps({"iteration": 39, "total_loss": 2.0, "bbox/AP": 11.5}),
        json.dumps({"iteration": 59, "total_loss": 9.0, "bbox/AP": 12.0}),  # then resumed at 40
        json.dumps({"iteration": 59, "total_loss": 1.5}),
        '{"iteration": 79, "total_l',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    return str(tmp_path)


def test_names_are_not_read_as_mathematics():
    for name in ("a$_$", r"$\foo$", "_hidden", "100 $"):
        plain = name.replace("$", "S").replace("\\", "/")
        for curves in ({name: ([1], [2])}, {plain: ([1], [2])}):
            picture = decode(plot_curves(curves, "x", "y"))
            # Without a legend, all above the frame is white.
            assert picture[:35].min() < 200, name
        assert decode(plot_points({name: [[1.0, 2.0]]}, "x")).std() > 10


def test_metrics_of_a_resumed_and_killed_run(run):
    rows = read_metrics(run)
    assert [row["iteration"] for row in rows] == [19, 39, 59]
    assert rows[2] == {"iteration": 59, "total_loss": 1.5, "bbox/AP": 12.0}
    assert metric_curve(rows, "total_loss") == ([20, 40, 60], [3.0, 2.0, 1.5])
    assert metric_curve(read_metrics(run + "/metrics.json"), "bbox/AP") == ([40, 60], [11.5, 12.0])
    assert metric_curve(read_metrics(run + "/"), "nothing") == ([], [])


def test_the_final_evaluation_is_at_the_last_step():
    """Detectron2 logs it after the loop, whose counter has gone on by one."""
    rows = [
        {"iteration": 99, "total_loss": 3.0, "bbox/AP": 1.0},
        {"iteration": 199, "bbox/AP": 2.0},
    ]
    assert metric_curve(rows, "bbox/AP") == ([100, 200], [1.0, 2.0])
    rows += [{"iteration": 299, "total_loss": 2.0}, {"iteration": 300, "bbox/AP": 3.0}]
    assert metric_curve(rows, "bbox/AP") == ([100, 200, 300], [1.0, 2.0, 3.0])
    assert metric_curve(rows, "total_loss") == ([100, 300], [3.0, 2.0])


def test_a_run_without_metrics_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no .*/metrics.json"):
        read_metrics(str(tmp_path))
    (tmp_path / "metrics.json").write_text("{}\n")
    with pytest.raises(UserError, match="has no metrics"):
        read_metrics(str(tmp_path))


def test_a_name_has_the_same_colour_in_every_figure():
    methods = ["MoCo v2", "BYOL", "SoCo", "CCOP", "MCL", "point-level region contrast"]
    labelled = ["full supervision (boxes and masks of all scenes)"]
    labelled.append("supervised MCL (labels of all scenes)")
    twice = [f"{name}, learning rate x 2" for name in ("BYOL", "MCL", "SoCo")]
    names = ["random weights", *methods, *labelled]
    chosen = colours(names)
    assert list(chosen) == names and len(set(chosen.values())) == 9
    for more in (labelled[::-1], twice, twice[::-1]):
        some = [*more, *methods[::-1], "random weights"]
        found = colours(some)
        assert len(set(found.values())) == len(some)
        assert {name: found[name] for name in names if name in some} == {
            name: chosen[name] for name in names if name in some
        }
    assert chosen["random weights"] == pytest.approx((127 / 255,) * 3)  # tab10's grey
    many = list(colours([str(i) for i in range(25)]).values())
    assert len(set(many[:10])) == len(set(many[10:20])) == 10 and len(set(many[20:])) == 5


def test_curves_are_drawn_where_their_values_are():
    picture = decode(plot_curves({"line": ([0, 100], [0, 1])}, "x", "y")).astype(int)
    assert picture.shape == (600, 960, 3)
    (colour,), (_, other) = rgb(["line"]), rgb(["line", "other"])
    blue = np.argwhere((abs(picture - colour) < 12).all(-1))
    blue = blue[blue[:, 0] > 60]  # not the legend
    assert np.corrcoef(blue[:, 1], -blue[:, 0])[0, 1] > 0.99  # a rising line
    assert np.ptp(blue[:, 1]) > 700 and np.ptp(blue[:, 0]) > 400
    orange = abs(picture - other).sum(-1) < 12
    assert not orange.any()
    two = {"line": ([0, 1], [0, 1]), "other": ([0, 1], [1, 0])}
    two = decode(plot_curves(two, "x", "y")).astype(int)
    assert (abs(two - other).sum(-1) < 12).sum() > 500


def test_curves_of_one_colour_differ_in_their_line():
    pictures = []
    for count in (11, 21):  # the colours begin again after ten
        curves = {str(i): ([], []) for i in range(count - 1)} | {"line": ([0, 100], [0, 1])}
        picture = decode(plot_curves(curves, "x", "y")).astype(int)[:, 500:]
        pictures.append((abs(picture - rgb(curves)[-1]) < 12).all(-1).any(0).sum())
    whole = decode(plot_curves({"line": ([0, 100], [0, 1])}, "x", "y")).astype(int)[:, 500:]
    whole = (abs(whole - rgb(["line"])[0]) < 12).all(-1).any(0).sum()
    dashes, dots = pictures
    assert dots < 0.8 * whole and dashes < 0.9 * whole and dots != dashes


def test_points_are_drawn_where_their_values_are():
    groups = {"upper": [[0.0, 40.0, 100.0]], "two": [[60.0]]}
    picture = decode(plot_points(groups, "AP (%)")).astype(int)
    assert picture.shape == (600, 960, 3)
    places = {}
    for name, colour in zip(groups, rgb(groups), strict=True):
        light = 0.7 * colour + 0.3 * 255
        found = np.argwhere((abs(picture - light) < 12).all(-1))
        assert np.ptp(found[:, 0]) < 14  # one line of points
        columns = np.unique(found[:, 1])
        starts = np.split(columns, np.flatnonzero(np.diff(columns) > 8) + 1)
        places[name] = found[:, 0].mean(), [(part[0] + part[-1]) / 2 for part in starts]
    assert places["upper"][0] < places["two"][0]
    left, middle, right = places["upper"][1]
    assert middle == pytest.approx(left + 0.4 * (right - left), abs=2)
    (only,) = places["two"][1]
    assert only == pytest.approx(left + 0.6 * (right - left), abs=2)
    # A group with an undefined value keeps its points, and has no tick at a mean.
    undefined = decode(plot_points({**groups, "two": [[60.0, None]]}, "AP (%)")).astype(int)
    black = [((p < 30).all(-1)[:, 150:900]).sum() for p in (picture, undefined)]
    assert black[1] < black[0] and (undefined == picture).all(-1).mean() > 0.99
    assert plot_points(groups, "AP (%)") != plot_points(dict(reversed(groups.items())), "AP (%)")


def test_lines_of_a_group_are_drawn_below_each_other():
    pictures = []
    for lines in ([[10.0, 20.0], [10.0, 20.0], [10.0]], [[10.0, 20.0]]):
        picture = decode(plot_points({"name": lines, "other": [[0.0]]}, "AP (%)")).astype(int)
        light = 0.7 * rgb(["name", "other"])[0] + 0.3 * 255
        rows = np.unique(np.argwhere((abs(picture - light) < 12).all(-1))[:, 0])
        pictures.append(np.split(rows, np.flatnonzero(np.diff(rows) > 3) + 1))
    three, one = pictures
    assert len(three) == 3 and len(one) == 1
    centres = [rows.mean() for rows in three]
    assert np.diff(centres) == pytest.approx(np.diff(centres).mean(), abs=1.5)
    assert centres[1] == pytest.approx(one[0].mean(), abs=1)


def test_error_bars_and_a_logarithmic_axis():
    curve = {"line": ([1, 10, 100], [0.0, 1.0, 0.0])}
    found = []
    for errors in (None, {"line": [0.0, 1.0, 0.0]}):
        picture = decode(plot_curves(curve, "x", "y", errors, log_x=True)).astype(int)
        blue = np.argwhere((abs(picture - rgb(curve)[0]) < 12).all(-1))
        found.append(blue[blue[:, 0] > 60])  # not the legend
    plain = found[0]
    peak = plain[plain[:, 0] < plain[:, 0].min() + 8, 1].mean()
    left, right = plain[:, 1].min(), 960 - 46
    assert peak == pytest.approx((left + right) / 2, abs=8)
    # A bar from 0 to 2 at the peak; without it, the curve crosses each column once.
    heights = [max(np.ptp(b[b[:, 1] == x, 0]) for x in np.unique(b[:, 1])) for b in found]
    assert heights[0] < 30 and heights[1] > 400
    unknown = plot_curves(curve, "x", "y", {"line": [np.nan] * 3}, log_x=True)
    assert unknown == plot_curves(curve, "x", "y", log_x=True)


def test_error_bars_of_equal_points_do_not_cover_each_other():
    curves, errors = {name: ([10, 100], [1.0, 1.0]) for name in "ab"}, {"a": [0, 1], "b": [0, 1]}
    picture = decode(plot_curves(curves, "x", "y", errors, log_x=True)).astype(int)
    lengths = [
        (abs(picture - colour) < 12).all(-1)[60:].sum(axis=0).max() for colour in rgb(curves)
    ]
    assert min(lengths) > 300 and max(lengths) - min(lengths) < 20


def test_the_legend_covers_no_curve():
    """Curves in all corners: their colour is in the frame's first and last columns."""
    curves = {f"a long name of a curve {i}": ([0, 1], [i, 9 - i]) for i in range(10)}
    picture = decode(plot_curves(curves, "x", "y")).astype(int)
    for index in (0, 9):
        colour = rgb(curves)[index]
        seen = np.argwhere((abs(picture - colour) < 12).all(-1))
        columns = np.unique(seen[seen[:, 0] > 130, 1])
        assert np.ptp(columns) > 700 and np.diff(columns).max() < 60, index


def test_labels_names_and_missing_data_are_drawn():
    curves = {"a": ([20, 40, 60], [3.0, 2.0, 1.5])}
    same = plot_curves(curves, "iteration", "loss")
    assert same == plot_curves(curves, "iteration", "loss")
    assert same != plot_curves({"another name": curves["a"]}, "iteration", "loss")
    assert same != plot_curves(curves, "iteration", "mask AP (%)")
    empty = plot_curves({"a": ([], [])}, "iteration", "loss")
    assert decode(empty).shape == (600, 960, 3)
    blue = (abs(decode(empty).astype(int) - rgb("a")[0]) < 12).all(-1)
    assert blue.sum() < 300  # only the legend's entry
    assert empty == plot_curves({"a": ((), ())}, "iteration", "loss")


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([3488, 13888, 55552], ["3,488", "13,888", "55,552"]),
        (np.geomspace(0.76, 73.4, 18), ["1", "2", "5", "10", "20", "50"]),
    ],
)
def test_ticks_of_a_logarithmic_axis(monkeypatch, places, expected):
    """One at each value, but not so many that their labels overlap."""
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    figure = plot_curves({"line": (list(places), list(places))}, "x", "y", log_x=True)
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    labels = axes.get_xticklabels()
    shown = [label.get_text() for label in labels if low <= label.get_position()[0] <= high]
    assert shown == expected
