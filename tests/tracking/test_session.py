"""Rows are kept during an outage, sent once, and never stop anything."""

import hashlib

import pytest

from region_pretrain.tracking.service import Checkpoint, Rows, RunInfo, Service
from region_pretrain.tracking.session import RETRY_AFTER, Session


class Recorder(Service):
    """A service in memory. Calls named in ``down`` fail."""

    name = "recorder"

    def __init__(self, known=-1, history=None, upload_model=False):
        self.messages, self.calls, self.down, self.known = [], [], set(), known
        info = RunInfo("run", history=history or {}, upload_model=upload_model)
        super().__init__(info, lambda level, text: self.messages.append((level, text)))

    def _call(self, *call):
        if call[0] in self.down:
            raise ConnectionError(f"no route for {call[0]}")
        self.calls.append(call)

    def open(self, last_try):
        self._call("open", last_try)
        return self.known

    def log(self, iteration, row, time):
        self._call("log", iteration, row)

    def log_picture(self, iteration, name, png):
        self._call("log_picture", iteration, name)

    def log_checkpoint(self, path, sha256):
        self._call("log_checkpoint", path, sha256)

    def upload(self, path):
        self._call("upload", path)

    def close(self, finished):
        self._call("close", finished)


@pytest.fixture
def clock():
    now = [0.0]

    def read():
        return now[0]

    read.now = now
    return read


def rows(*iterations, pictures=()):
    return Rows(0.0, {i: {"loss": i / 10} for i in iterations}, pictures)


def test_history_then_rows_and_pictures_in_order_of_their_iterations(clock):
    service = Recorder(history={3: {"loss": 0.3}, 5: {"loss": 0.5}})
    session = Session(service, clock)
    session.add(rows(7, 9, pictures=((8, "views", b""), (9, "views", b""))))
    session.send()
    session.close(True)
    assert service.calls == [
        ("open", False),
        ("log", 3, {"loss": 0.3}),
        ("log", 5, {"loss": 0.5}),
        ("log", 7, {"loss": 0.7}),
        ("log_picture", 8, "views"),
        ("log", 9, {"loss": 0.9}),
        ("log_picture", 9, "views"),
        ("close", True),
    ]
    assert service.messages == []


def test_what_the_service_has_from_earlier_attempts_is_not_sent_again(clock):
    service = Recorder(known=7, history={3: {"loss": 0.3}})
    session = Session(service, clock)
    session.add(rows(5, 7, 9, pictures=((7, "views", b""), (8, "views", b""))))
    session.send()
    assert service.calls[1:] == [("log_picture", 8, "views"), ("log", 9, {"loss": 0.9})]


@pytest.mark.parametrize("broken", ["open", "log"])
def test_an_outage_is_one_warning_and_loses_nothing(clock, broken):
    service = Recorder()
    session = Session(service, clock)
    service.down = {broken}
    for i in range(5):
        session.add(rows(i))
        session.send()
        clock.now[0] += RETRY_AFTER / 2
    assert session.pending == 5
    assert service.messages == [
        (
            "warning",
            f"recorder cannot be reached: ConnectionError: no route for {broken}. The training "
            "continues; its metrics are kept and sent later",
        )
    ]
    service.down = set()
    clock.now[0] += RETRY_AFTER
    session.send()
    logged = [call[1] for call in service.calls if call[0] == "log"]
    assert logged == [0, 1, 2, 3, 4] and session.pending == 0
    assert service.messages[1:] == [("info", "recorder has received the metrics that were kept")]


def test_after_a_failure_it_waits_before_it_tries_again(clock):
    service = Recorder()
    session, tries = Session(service, clock), []
    service._call = lambda *call: tries.append(clock()) or 1 / 0
    for second in range(0, 150, 10):
        clock.now[0] = second
        session.send()
    assert tries == [0, 60, 120]


def test_an_outage_until_the_end_is_reported_with_what_is_missing(clock):
    service = Recorder()
    service.down = {"open"}
    session = Session(service, clock)
    session.add(rows(0, 1, 2))
    session.send()
    session.close(False)
    assert service.messages[-1] == (
        "warning",
        "recorder lacks 3 rows of metrics.json, which --resume sends: ConnectionError: no route "
        "for open",
    )
    assert len(service.messages) == 2


def test_the_last_try_is_announced_and_made_at_once(clock):
    service = Recorder()
    service.down = {"open"}
    session = Session(service, clock)
    session.add(rows(0))
    session.send()
    service.down = set()
    session.close(True)
    assert service.calls == [("open", True), ("log", 0, {"loss": 0.0}), ("close", True)]


def test_checkpoints_are_hashed_and_only_the_final_one_is_uploaded(tmp_path, clock):
    service = Recorder(upload_model=True)
    session = Session(service, clock)
    hashes = {}
    for name in ("model_0000003.pth", "model_final.pth"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
        hashes[name] = hashlib.sha256(name.encode() * 1000).hexdigest()
        session.add(Checkpoint(str(tmp_path / name)))
    session.add(Checkpoint(str(tmp_path / "model_0000001.pth")))  # already replaced
    session.send()
    assert service.calls[1:] == [
        ("log_checkpoint", str(tmp_path / name), hashes[name]) for name in hashes
    ] + [("upload", str(tmp_path / "model_final.pth"))]


def test_a_refused_picture_is_dropped_and_reported_once(clock):
    service = Recorder()
    service.down = {"log_picture"}
    session = Session(service, clock)
    for i in range(3):
        session.add(rows(i, pictures=((i, "views", b""),)))
        session.send()
    assert [call[1] for call in service.calls if call[0] == "log"] == [0, 1, 2]
    assert [level for level, _ in service.messages] == ["warning"]
    assert "did not accept a picture or checkpoint" in service.messages[0][1]
