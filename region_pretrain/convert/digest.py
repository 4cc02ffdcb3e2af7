"""A digest of exported weights, for formats without checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

#: The entry of an exported file that contains its digest.
DIGEST = "sha256"


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of all entries but :data:`DIGEST`, in any order.

    Args:
        content: nested dicts of tensors and of values that JSON can represent.
    """
    digest = hashlib.sha256()
    _add(digest, {key: value for key, value in content.items() if key != DIGEST})
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}\n".encode())
            _add(digest, value[key])
        digest.update(b"end\n")
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(f"{json.dumps(value, default=repr)}\n".encode())
