"""What a wheel contains."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_build_has_the_type_marker_the_configs_and_the_projects(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("py.typed", "configs/common/train.py", "projects/soco/__init__.py"):
        assert (tmp_path / "region_pretrain" / name).is_file(), name
