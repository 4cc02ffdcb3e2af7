"""The process that talks to a tracking service.

``python -m region_pretrain.tracking.process NAME`` reads pickled messages from its standard input,
and writes lines for the user to its standard output: a level, a space, and a text. The first line
is ``ready``, or has the level ``error``.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO

from region_pretrain.errors import UserError, describe
from region_pretrain.tracking.service import End, RunInfo, Service
from region_pretrain.tracking.session import RETRY_AFTER, Session


def create(name: str, info: RunInfo, report: Callable[[str, str], None]) -> Service:
    """A service by its short name.

    Raises:
        UserError: its settings are unusable.
        ImportError: its package does not work.
    """
    if name == "wandb":
        from region_pretrain.tracking.wandb_service import WandbService as Chosen
    else:
        from region_pretrain.tracking.mlflow_service import MlflowService as Chosen
    return Chosen(info, report)


def serve(service: Service, messages: queue.Queue) -> None:
    """Pass messages on until :class:`~region_pretrain.tracking.service.End`."""
    session = Session(service)
    session.send()
    while True:
        try:
            message = messages.get(timeout=RETRY_AFTER if session.pending else None)
        except queue.Empty:
            message = None
        if isinstance(message, End):
            session.close(message.finished)
            return
        if message is not None:
            session.add(message)
        session.send()


def _read(stream: BinaryIO, messages: queue.Queue) -> None:
    """Never lets the training wait for a full pipe."""
    try:
        while not isinstance(message := pickle.load(stream), End):
            messages.put(message)
    except Exception:  # the training process was killed
        message = End(finished=False)
    messages.put(message)


def main() -> int:
    """Serve the service that the command line names."""
    # A scheduler's or the keyboard's signals are for the training, which ends this process.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print

    def report(level: str, text: str) -> None:
        try:
            print(level, " ".join(text.split()), file=output, flush=True)
        except OSError:  # the training process was killed
            pass

    messages: queue.Queue = queue.Queue()
    info = pickle.load(sys.stdin.buffer)
    try:
        service = create(sys.argv[1], info, report)
    except Exception as error:
        report("error", describe(error) if isinstance(error, UserError) else _broken(error))
        return 2
    report("ready", "")
    threading.Thread(target=_read, args=(sys.stdin.buffer, messages), daemon=True).start()
    serve(service, messages)
    return 0


def _broken(error: Exception) -> str:
    return f"train.writers: {sys.argv[1]} does not work: {describe(error)}"


if __name__ == "__main__":
    sys.exit(main())
