"""Passes a run on to a service, through outages."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from region_pretrain.errors import describe
from region_pretrain.files import sha256_of
from region_pretrain.tracking.service import SERVICES, Checkpoint, Rows, Service

#: Seconds from a failure to the next attempt.
RETRY_AFTER = 60.0


@dataclass(frozen=True)
class _Entry:
    """One call of the service; only rows are repeated until they succeed."""

    iteration: int | None
    is_row: bool
    call: Callable[[], None]


class Session:
    """Keeps what the service has not accepted yet, and tries again later.

    Metrics are sent in order, and each iteration once. A picture, checkpoint or upload that the
    service refuses is dropped. The user gets one warning per outage, and one about refusals.

    Args:
        service: the service, not opened yet.
        clock: returns seconds.
    """

    def __init__(self, service: Service, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._title = SERVICES.get(service.name, service.name)
        self._report = service.report
        self._clock = clock
        self._entries: deque[_Entry] = deque()
        self._known: int | None = None  # newest iteration of earlier attempts at the service
        self._failed_at: float | None = None
        self._failure = ""
        self._refused = False
        self.add(Rows(time.time(), service.info.history))

    def add(self, message: Rows | Checkpoint) -> None:
        """Keep a message for :meth:`send`."""
        if isinstance(message, Checkpoint):
            self._entries.append(_Entry(None, False, partial(self._record, message.path)))
            return
        service, new = self._service, []
        for iteration, row in message.rows.items():
            new.append(_Entry(iteration, True, partial(service.log, iteration, row, message.time)))
        for iteration, name, png in message.pictures:
            call = partial(service.log_picture, iteration, name, png)
            new.append(_Entry(iteration, False, call))
        self._entries.extend(sorted(new, key=lambda entry: entry.iteration))

    @property
    def pending(self) -> int:
        """Number of rows that the service has not accepted."""
        return sum(entry.is_row for entry in self._entries)

    def send(self, last_try: bool = False) -> None:
        """Send what can be sent now; does nothing shortly after a failure.

        Args:
            last_try: try even then.
        """
        now, failed = self._clock(), self._failed_at is not None
        if failed and not last_try and now - self._failed_at < RETRY_AFTER:
            return
        try:
            if self._known is None:
                self._known = self._service.open(last_try)
            while self._entries:
                self._send_entry(self._entries[0])
                self._entries.popleft()
        except Exception as error:
            self._failure = _reason(error)
            if not failed:
                self._report(
                    "warning",
                    f"{self._title} cannot be reached: {self._failure}. The training continues; "
                    "its metrics are kept and sent later",
                )
            self._failed_at = now
            return
        if failed:
            self._report("info", f"{self._title} has received the metrics that were kept")
        self._failed_at = None

    def _send_entry(self, entry: _Entry) -> None:
        if entry.iteration is not None and entry.iteration <= self._known:
            return
        try:
            entry.call()
        except Exception as error:
            if entry.is_row:
                raise
            if not self._refused:
                self._report(
                    "warning",
                    f"{self._title} did not accept a picture or checkpoint: {_reason(error)}. "
                    "There is no further warning about this",
                )
            self._refused = True

    def _record(self, path: str) -> None:
        if not os.path.isfile(path):  # a newer one has replaced it
            return
        self._service.log_checkpoint(path, sha256_of(path))
        if self._service.info.upload_model and os.path.basename(path) == "model_final.pth":
            self._service.upload(path)

    def close(self, finished: bool) -> None:
        """Try once more to send everything, and end the run at the service."""
        self.send(last_try=True)
        if self._entries:
            self._report(
                "warning",
                f"{self._title} lacks {self.pending} rows of metrics.json, which --resume sends: "
                f"{self._failure}",
            )
            return
        try:
            self._service.close(finished)
        except Exception as error:
            self._report("warning", f"{self._title}: {_reason(error)}")


def _reason(error: Exception) -> str:
    return describe(error)[:300].rstrip(".")
