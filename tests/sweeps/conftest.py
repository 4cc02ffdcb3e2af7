"""Puts the modules that tests share where they can import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_queue import queue, start  # noqa: E402, F401  fixtures
from fake_sweeps import sweeps  # noqa: E402, F401  a fixture
