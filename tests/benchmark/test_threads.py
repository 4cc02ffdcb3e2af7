import sys

import pytest

from region_pretrain.benchmark.threads import Rates, compare_settings, describe_settings
from region_pretrain.errors import UserError

#: Logs an iteration every 100 ms, or ten times as often with a setting; ends if told to.
TOOL = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1].partition("=")[2])
assert "train.log_period=1" in sys.argv and "GOMP_SPINCOUNT" not in os.environ
if "FAIL" in os.environ:
    sys.exit("error: no data set is called x")
folder.mkdir()
while True:
    time.sleep(0.1 if os.environ["OMP_NUM_THREADS"] == "1" else 0.01)
    with open(folder / "metrics.json", "a") as file:
        file.write("{}" + chr(10))
"""


def test_trainings_take_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # the user's own must not affect the settings
    (tmp_path / "tool.py").write_text(TOOL)
    command = [sys.executable, str(tmp_path / "tool.py")]
    settings = {"two": {"OMP_NUM_THREADS": "2"}, "one": {"OMP_NUM_THREADS": "1"}}
    rates = compare_settings(command, str(tmp_path), settings, 0.6, 3)
    assert [len(found.alone) + len(found.beside) for found in rates.values()] == [6, 6]
    two, one = (found.medians()[0] for found in rates.values())
    assert one < 50 and two < 100 and 2 < two / one < 11
    with pytest.raises(UserError, match="the training ended: error: no data set is called x"):
        compare_settings(command, str(tmp_path), {"x": {"FAIL": "1"}}, 0.1, 1)


def test_the_table_is_relative_to_the_first_setting():
    rates = {"a": Rates([10.0, 30.0], [5.0]), "b": Rates([5.0], [4.0])}
    rows = [line.split() for line in describe_settings(rates).splitlines()[2:]]
    assert rows == [["a", "1.00", "0.25", "0.25"], ["b", "0.25", "0.20", "0.80"]]
