"""Puts ``sources`` and ``export_models`` where tests can import them by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
