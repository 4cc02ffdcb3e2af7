"""Region-level self-supervised pre-training of Detectron2 detectors.

The functions below are the Python API. They are imported when they are first used, so that
``import region_pretrain`` takes milliseconds.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# PyTorch reads this when it is imported. By default, the threads of OpenMP spin while they wait for
# each other, which makes a training many times slower as soon as any other process computes.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

#: Name -> the module that defines it.
_API = {
    "UserError": "errors",
    "get_config": "config",
    "RegionStore": "regions",
    "make_regions": "api.regions",
    "pretrain_config": "api.pretraining",
    "pretrain": "api.pretraining",
    "finetune": "api.finetuning",
    "evaluate": "api.finetuning",
    "show_views": "api.pictures",
    "show_detections": "api.pictures",
    "read_card": "zoo",
}
__all__ = ["__version__", *_API]

if TYPE_CHECKING:
    from region_pretrain.api.finetuning import evaluate as evaluate
    from region_pretrain.api.finetuning import finetune as finetune
    from region_pretrain.api.pictures import show_detections as show_detections
    from region_pretrain.api.pictures import show_views as show_views
    from region_pretrain.api.pretraining import pretrain as pretrain
    from region_pretrain.api.pretraining import pretrain_config as pretrain_config
    from region_pretrain.api.regions import make_regions as make_regions
    from region_pretrain.config import get_config as get_config
    from region_pretrain.errors import UserError as UserError
    from region_pretrain.regions import RegionStore as RegionStore
    from region_pretrain.zoo import read_card as read_card


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings = importlib.import_module(f"{__name__}.warnings")
    with warnings.library_warnings_ignored():
        value = getattr(importlib.import_module(f"{__name__}.{_API[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
