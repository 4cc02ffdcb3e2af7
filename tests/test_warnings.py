"""Only command-line tools change how warnings are shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Changes the filters for the lines below it only.
_RESTORED = """\
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
"""
NEED_NO_LIBRARY = ("install_detectron2", "local_slurm")
TOOLS = sorted(p for p in (ROOT / "tools").glob("*.py") if p.stem not in NEED_NO_LIBRARY)


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_importing_the_library_leaves_the_warning_filters_alone():
    code = (
        "import pkgutil, warnings\n"
        "before = list(warnings.filters)\n"
        "import region_pretrain\n"
        "for name in 'contract', 'errors', 'files', 'progress', 'warnings':\n"
        "    __import__(f'region_pretrain.{name}')\n"
        "assert warnings.filters == before\n"
        "warnings.warn('visible', FutureWarning)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning: visible" in done.stderr


def test_no_other_module_of_the_library_changes_the_filters():
    for path in (ROOT / "region_pretrain").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = text.replace(_RESTORED, "")
        if path != ROOT / "region_pretrain/warnings.py":
            assert "filterwarnings" not in text and "simplefilter" not in text, path


@pytest.mark.parametrize("tool", TOOLS, ids=lambda p: p.stem)
def test_tools_hide_library_warnings_before_they_import_anything_else(tool):
    text = tool.read_text(encoding="utf-8")
    imports = set(re.findall(r"^ *(?:import|from) (\S+)", text, re.MULTILINE))
    assert imports - {"sys"} == {f"region_pretrain.commands.{tool.stem}"}


def test_the_commands_hide_what_pytorch_logs_about_its_own_parts():
    code = (
        "import region_pretrain.commands.cli\n"
        "from torch.fx._symbolic_trace import is_fx_tracing\n"
        "is_fx_tracing()\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_hide_library_warnings_before_they_import_anything_else():
    code = (
        "import sys, warnings\n"
        "import region_pretrain.commands.cli\n"
        "assert not {'torch', 'detectron2', 'numpy'} & set(sys.modules)\n"
        "warnings.warn('hidden', FutureWarning)\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_filters_of_the_user_take_precedence():
    code = (
        "from region_pretrain.warnings import ignore_library_warnings\n"
        "import warnings\n"
        "ignore_library_warnings()\n"
        "warnings.warn('torch.meshgrid: in an upcoming release')\n"
        "warnings.warn('shown', FutureWarning)\n"
    )
    assert run("-c", code).stderr == ""
    assert "FutureWarning: shown" in run("-W", "default", "-c", code).stderr
    assert run("-W", "error", "-c", code).returncode == 1


def test_a_tool_starts_without_a_warning():
    done = run("tools/pretrain_net.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
