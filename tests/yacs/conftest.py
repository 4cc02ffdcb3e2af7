"""Puts ``zoo`` where the tests of this folder can import it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zoo import register_coco


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> str:
    """A registered COCO data set of six small images."""
    return register_coco("yacs_tests", tmp_path_factory.mktemp("coco"))
