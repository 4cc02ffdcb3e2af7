"""Detectron2's yacs configs: found, loaded, and converted to LazyConfigs."""

from region_pretrain.yacs.convert import to_lazy_config
from region_pretrain.yacs.counterparts import counterpart, refuse_converted_keys, refuse_weights
from region_pretrain.yacs.detector import lazy_detector
from region_pretrain.yacs.files import (
    find_config_file,
    is_yacs,
    override_yacs,
    read_yacs,
    split_overrides,
)

__all__ = [
    "counterpart",
    "find_config_file",
    "is_yacs",
    "lazy_detector",
    "override_yacs",
    "read_yacs",
    "refuse_converted_keys",
    "refuse_weights",
    "split_overrides",
    "to_lazy_config",
]
