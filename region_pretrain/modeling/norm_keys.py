"""Errors about norms in a detector's config, with their keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf

from region_pretrain.errors import UserError

#: The names that ``detectron2.layers.get_norm`` knows, without those for debugging.
_NAMES = ("BN", "SyncBN", "FrozenBN", "GN", "LN")


@contextmanager
def norm_errors(config: Any) -> Iterator[None]:
    """Name the keys of a norm that ``detectron2.layers.get_norm`` cannot build.

    Args:
        config: what is built in the context, a lazy object or a yacs config.

    Raises:
        UserError: a norm does not exist, or does not fit the channels.
    """
    try:
        yield
    except (KeyError, ValueError) as error:
        norms = dict(_norms(config))
        if isinstance(error, KeyError):
            wrong = [key for key, norm in norms.items() if error.args == (norm,)]
            wrong = [key for key in wrong if norms[key] not in _NAMES]
            mend = f"must be {', '.join(_NAMES)}, a function of the channels, or empty"
        else:
            is_of_groups = "num_channels" in str(error)
            wrong = [key for key, norm in norms.items() if is_of_groups and norm == "GN"]
            mend = (
                f"{error}: set it to LN or BN, or the layer's channels to a multiple of the 32 "
                "groups"
            )
        if not wrong:
            raise
        pairs = " ".join(f"{key}={norms[key]}" for key in wrong)
        raise UserError(f"{pairs}: {mend}") from error


def _norms(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Key and value of every norm that is a name; interpolations are left out."""
    if isinstance(node, DictConfig | ListConfig):
        prefix = prefix or node._get_full_key(None)
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, CfgNode | dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            name = f"{prefix}.{key}".removeprefix(".")
            if isinstance(value, str) and name.lower().endswith("norm"):
                yield name.rpartition(".cfg.")[2], value  # of a yacs config
            else:
                yield from _norms(value, name)
