"""Puts ``project_runs`` where the tests of all projects, and their processes, can import it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
