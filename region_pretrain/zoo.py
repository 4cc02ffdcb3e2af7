"""Published weights and their cards: ``metafile.yml`` in OpenMMLab's format, ``zoo://NAME``.

A metafile lists weights under ``Models``, each with ``Name``, ``In Collection``, ``Config``,
``Metadata`` (with the ``SHA256`` of the file), ``Results`` and ``Weights``, a path relative to the
metafile or a URL. ``zoo://NAME`` is accepted wherever Detectron2's PathManager opens a file, once
this module is imported, and the file's hash is checked each time.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import os
import re
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, get_cache_dir

from region_pretrain.errors import UserError, describe
from region_pretrain.files import is_local, sha256_of, write_atomic, write_text_atomic
from region_pretrain.shipped import ROOT

PREFIX = "zoo://"
METAFILE = "metafile.yml"
#: Environment variable with further metafiles, paths or URLs, separated by spaces.
VARIABLE = "REGION_PRETRAIN_ZOO"
#: Where ``make zoo`` writes.
DEFAULT_FOLDER = os.path.join("output", "zoo")
_WEB = ("http://", "https://")
_SECONDS = 30.0  # until a server must answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Card:
    """What is known about published weights.

    Attributes:
        name: their name.
        weights: path or URL of the file.
        sha256: of the file.
        collection: the method.
        config: the config that they were made with.
        metadata: all entries of ``Metadata``: data, length, versions, ...
        results: entries with ``Task``, ``Dataset`` and ``Metrics``, and for ``Fine-tuning`` how
            they were measured.
        paper: of the collection: ``Title`` and ``URL``.
    """

    name: str
    weights: str
    sha256: str
    collection: str = ""
    config: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
    paper: Mapping[str, str] = field(default_factory=dict)

    def file(self) -> str:
        """The local path of the weights, downloaded if necessary.

        Raises:
            UserError: the file is missing, or its hash is not that of the card.
        """
        try:
            path = PathManager.get_local_path(self.weights, **self._cache())
            found = sha256_of(path)
        except Exception as error:  # raised by the server or by the disk
            raise UserError(
                f"the weights of {PREFIX}{self.name} cannot be read: {self.weights}: "
                f"{describe(error)}"
            ) from error
        if found != self.sha256:
            raise UserError(
                f"{path} is not the file of {PREFIX}{self.name}: its sha256 is {found[:16]}..., "
                f"the card's {self.sha256[:16]}...; delete it and fetch or make it again"
            )
        return path

    def _cache(self) -> dict[str, str]:
        """Of downloads: iopath's has one file for the same path on several hosts."""
        if not self.weights.startswith(_WEB):
            return {}
        return {"cache_dir": os.path.join(get_cache_dir(), "zoo", self.sha256[:16])}


def read_metafile(path: str) -> dict[str, Card]:
    """The cards of a metafile by name.

    Args:
        path: file or URL.

    Raises:
        UserError: the file cannot be read, or is not a metafile.
    """
    content = read_content(path)
    named = _entry(path, content, "Collections", list)
    collections = {str(c.get("Name")): c for c in named if isinstance(c, dict)}
    cards: dict[str, Card] = {}
    for model in content["Models"]:
        card = _card(path, model, collections)
        if card.name in cards:
            raise UserError(f"{path} has two models called {card.name}: rename one")
        cards[card.name] = card
    return cards


def _fetch(url: str) -> bytes:
    """A metafile as it is now; without a connection, as it was. PathManager keeps the first one."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    kept = os.path.join(get_cache_dir(), "zoo", f"{name}.yml")
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:
            data = response.read()
    except OSError as error:
        if not os.path.isfile(kept):
            raise
        logger.warning("%s cannot be read (%s): using its copy %s", url, describe(error), kept)
        with open(kept, "rb") as file:
            return file.read()
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    write_atomic(kept, lambda file: file.write(data))
    return data


def read_content(path: str) -> dict[str, Any]:
    """What a metafile contains, as plain values. One at a URL is fetched each time.

    Raises:
        UserError: the file cannot be read, or is not a metafile.
    """
    try:
        if path.startswith(_WEB):
            data = _fetch(path)
        else:
            with PathManager.open(path, "rb") as file:
                data = file.read()
        content = yaml.safe_load(data.decode())
    except FileNotFoundError:
        raise UserError(f"there is no {path}: expected cards of weights") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("Models"), list):
        raise UserError(f"{path} is not a {METAFILE}: it has no list Models")
    return content


def _card(path: str, model: Any, collections: Mapping[str, Any]) -> Card:
    entries = model if isinstance(model, dict) else {}
    metadata = _entry(path, entries, "Metadata", dict)
    name, weights, sha256 = entries.get("Name"), entries.get("Weights"), metadata.get("SHA256")
    for key, value in (("Name", name), ("Weights", weights), ("Metadata.SHA256", sha256)):
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}: the model {name or '?'} has no {key}")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(f"{path}: Metadata.SHA256 of {name} must be 64 hexadecimal digits")
    if is_local(weights) and not os.path.isabs(weights):
        weights = f"{os.path.dirname(path) or '.'}/{weights}"
    collection = str(entries.get("In Collection") or "")
    return Card(
        name,
        weights,
        sha256,
        collection,
        entries.get("Config", ""),
        metadata,
        _entry(path, entries, "Results", list),
        _entry(path, collections.get(collection, {}), "Paper", dict),
    )


def _entry(path: str, entries: Mapping[str, Any], key: str, kind: type) -> Any:
    value = entries.get(key) or kind()
    if not isinstance(value, kind):
        expected = "a map" if kind is dict else "a list"
        raise UserError(f"{path}: {key} must be {expected}, not {value!r}")
    return value


def metafiles() -> list[str]:
    """The metafiles in which names are looked up, those of the user first."""
    found = os.environ.get(VARIABLE, "").split()
    local = os.path.join(DEFAULT_FOLDER, METAFILE)
    found += [local] if os.path.isfile(local) else []
    return found + sorted(glob.glob(str(ROOT / "projects" / "*" / METAFILE)))


def read_card(name: str, metafile: str | None = None) -> Card:
    """Find the card of published weights.

    Args:
        name: their name, with or without ``zoo://``.
        metafile: path or URL of a metafile; None looks in those of the environment variable
            ``REGION_PRETRAIN_ZOO``, in ``output/zoo`` and in ``projects/``.

    Raises:
        UserError: there is no such card; the message lists similar names.
    """
    name, places = name.removeprefix(PREFIX), metafiles() if metafile is None else [metafile]
    known: list[str] = []
    for path in places:
        cards = read_metafile(path)
        if name in cards:
            return cards[name]
        known += cards
    if not known:
        raise UserError(
            f"no {PREFIX}{name}, as there are no cards of weights: run `make zoo`, or list "
            f"metafiles in the environment variable {VARIABLE}"
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)[:10]
    raise UserError(f"no {PREFIX}{name} in {', '.join(places)}; similar are {', '.join(near)}")


def write_metafile(path: str, content: Mapping[str, Any]) -> None:
    """Write a metafile; the order of the keys is kept."""
    write_text_atomic(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


class _Zoo(PathHandler):
    """Opens ``zoo://NAME``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return read_card(path).file()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(self._get_local_path(path))

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if "w" in mode or "a" in mode:
            raise UserError(f"{path} is read-only")
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(_Zoo(), allow_override=True)
