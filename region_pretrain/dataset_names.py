"""Data sets named by path, such as ``coco://train.json?images=DIR``, wherever a config has them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from omegaconf import DictConfig, ListConfig

from region_pretrain.errors import UserError, did_you_mean

#: Scheme -> how a name is written.
FORMS = {
    "folder": "folder://DIR",
    "coco": "coco://ANN.json?images=DIR",
    "voc": "voc://ROOT?split=NAME",
}
_PREFIXES = tuple(f"{scheme}://" for scheme in FORMS)
_REQUIRED = {"folder": (), "coco": ("images",), "voc": ("split",)}
_OPTIONAL = ("bits", "bands")


@dataclass(frozen=True)
class Source:
    """A parsed name.

    Attributes:
        scheme: ``folder``, ``coco`` or ``voc``.
        path: the folder, the json, or the root of the VOC layout.
        images: ``coco``: folder of the images.
        split: ``voc``: name of the list in ``ImageSets/Main``.
        reading: options for reading the pixels: ``bits``, significant bits of 16-bit images, and
            ``bands``, the numbers (from 1) of the bands to use as red, green and blue, or of the
            one to show as grey.
    """

    scheme: str
    path: str
    images: str = ""
    split: str = ""
    reading: dict[str, Any] = field(default_factory=dict)


def is_path_name(name: str) -> bool:
    """Whether a data set is named by path: ``SCHEME://...``, with a known scheme or not."""
    return re.match(r"\w+://", name) is not None


def parse(name: str) -> Source:
    """Parse the name of a data set: ``SCHEME://PATH?OPTION=VALUE&OPTION=VALUE``.

    ``%``, ``?`` and ``&`` in a path are written ``%25``, ``%3F`` and ``%26``.

    Raises:
        UserError: an unknown scheme or option, an invalid value, or a missing option.
    """
    scheme, _, rest = name.partition("://")
    if scheme not in FORMS:
        raise UserError(
            f"data set {name!r}: there is no {scheme}://; write {', '.join(FORMS.values())}, or "
            "the name of a registered data set"
        )
    path, question, query = rest.partition("?")
    options: dict[str, str] = {}
    known = (*_REQUIRED[scheme], *_OPTIONAL)
    for item in query.split("&") if question else []:
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            options_of = [f"{k}=" for k in known]
            raise UserError(
                f"data set {name!r}: no option {item!r}{did_you_mean(f'{key}=', options_of)}; "
                f"{scheme}:// has {', '.join(options_of)}; in a path write %3F for ? and %26 for &"
            )
        if not value or key in options:
            raise UserError(f"data set {name!r}: {key}= needs one value")
        options[key] = unquote(value)
    missing = [key for key in _REQUIRED[scheme] if key not in options]
    if missing or not path and scheme != "folder":
        lacks = f"no {missing[0]}=" if missing else "no path"
        raise UserError(f"data set {name!r} has {lacks}: write {FORMS[scheme]}")
    return Source(
        scheme,
        os.path.expanduser(unquote(path)),
        os.path.expanduser(options.get("images", "")),
        options.get("split", ""),
        _reading(name, options),
    )


def _reading(name: str, options: dict[str, str]) -> dict[str, Any]:
    reading: dict[str, Any] = {}
    if "bits" in options:
        bits = options["bits"]
        if not bits.isascii() or not bits.isdigit() or not 1 <= int(bits) <= 16:
            raise UserError(f"data set {name!r}: bits={bits} must be a number from 1 to 16")
        reading["bits"] = int(bits)
    if "bands" in options:
        if not re.fullmatch(r"[1-9]\d*((,[1-9]\d*){2})?", options["bands"], re.ASCII):
            raise UserError(
                f"data set {name!r}: bands={options['bands']} must be three numbers from 1, the "
                "bands to use as red, green and blue (bands=4,3,2), or the one to show as grey"
            )
        reading["bands"] = [int(band) for band in options["bands"].split(",")]
    return reading


def folder_name(root: str) -> str:
    """The name of a folder of images as a data set."""
    return f"folder://{_quote(root)}"


def _quote(path: str) -> str:
    return re.sub("[%?&]", lambda match: f"%{ord(match[0]):02X}", path)


def absolute(name: str) -> str:
    """The same data set with absolute paths; a name without relative paths does not change.

    Raises:
        UserError: see :func:`parse`.
    """
    parse(name)
    scheme, _, rest = name.partition("://")
    path, question, query = rest.partition("?")
    items = [
        f"images={_absolute_path(item[len('images=') :])}" if item.startswith("images=") else item
        for item in query.split("&")
    ]
    return f"{scheme}://{_absolute_path(path)}{question}{'&'.join(items)}"


def _absolute_path(quoted: str) -> str:
    path = unquote(quoted)
    if not path or os.path.isabs(path) or is_path_name(path):
        return quoted
    return _quote(os.path.abspath(os.path.expanduser(path)))


def names_in(cfg: DictConfig | ListConfig) -> list[str]:
    """Every name by path in a config, at any key."""
    found: list[str] = []
    _visit(cfg, lambda parent, key: found.append(parent[key]))
    return list(dict.fromkeys(found))


def make_names_absolute(cfg: DictConfig) -> None:
    """Make the relative paths in all names by path absolute; ``cfg`` is changed in place.

    Raises:
        UserError: see :func:`parse`.
    """

    def replace(parent: DictConfig | ListConfig, key: Any) -> None:
        if (name := absolute(parent[key])) != parent[key]:
            parent[key] = name

    _visit(cfg, replace)


def _visit(node: DictConfig | ListConfig, visit: Callable[[Any, Any], None]) -> None:
    """Call ``visit(container, key)`` for every name by path; interpolations are not followed."""
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    for key in list(node.keys()) if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            _visit(child, visit)
        elif isinstance(text := child._value(), str) and text.startswith(_PREFIXES):
            visit(node, key)
