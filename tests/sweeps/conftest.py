"""Puts ``sweep_plans`` and ``fake_sweeps`` where tests can import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_sweeps import sweeps  # noqa: E402, F401  a fixture
