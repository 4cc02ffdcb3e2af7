"""Puts ``narrow`` where tests can import it."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def loggers_are_ours():
    """Other tests of this process may have left handlers."""
    for name in ("fvcore", "detectron2", "region_pretrain"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
