"""Software versions and hardware, for reports."""

from __future__ import annotations

import os
import platform
from typing import Any

import detectron2
import numpy as np
import torch
import torchvision

from region_pretrain import __version__
from region_pretrain.system import cores


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
    """``cpu``, ``cores``, ``system``, and ``gpu`` if there is one."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    found = {"cpu": name, "cores": len(cores()), "system": platform.platform()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
