"""Software versions and hardware, for reports."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

import detectron2
import numpy as np
import torch
import torchvision

from region_pretrain import __version__
from region_pretrain.json_files import read_json, write_json
from region_pretrain.system import cores

#: Name of the file in a run's output folder.
ENVIRONMENT_FILE = "environment.json"


def versions() -> dict[str, str]:
    """Versions of the software that results may depend on."""
    return {
        "region_pretrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "numpy": np.__version__,
    }


def machine() -> dict[str, Any]:
    """``cpu``, ``instructions``, ``cores``, ``system``, and ``gpu`` if there is one."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        models = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    found = {"cpu": name, "instructions": torch.backends.cpu.get_cpu_capability()}
    found |= {"cores": len(cores()), "system": platform.platform()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_environment(folder: str, device: str) -> None:
    """Write what a run computes with into its output folder.

    Args:
        folder: a path or a PathManager URL.
        device: the type of the device that it computes on: ``cuda``, ``mps`` or ``cpu``.
    """
    facts = {"device": device, **machine(), **versions()}
    write_json(os.path.join(folder, ENVIRONMENT_FILE), facts)


def read_machine(folder: str) -> str | None:
    """On what a run was computed last: runs with equal seeds are equal only on equal machines.

    Returns:
        E.g. ``NVIDIA H200, PyTorch 2.11.0``, or on the CPU its model and instruction set; None if
        the folder of the run does not say.
    """
    path = os.path.join(folder, ENVIRONMENT_FILE)
    if not os.path.isfile(path):
        return None
    facts = read_json(path, dict[str, Any], "delete it")
    names = ("gpu",) if facts.get("device") == "cuda" else ("cpu", "instructions")
    found = [str(facts[name]) for name in names if name in facts]
    version = str(facts.get("torch", "")).partition("+")[0]  # without the build's CUDA version
    return ", ".join([*found, f"PyTorch {version}"]) if version else None
