"""Finds config files, recognises and reads those of yacs, and applies ``UPPER.CASE=value``."""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError, describe, did_you_mean
from region_pretrain.shipped import ROOT, find_shipped

_ZOO = "model_zoo://"
_TOP_LEVEL_KEY = re.compile(r"^[\"']?(\w+)[\"']?\s*:", re.MULTILINE)
_YACS_OVERRIDE = re.compile(r"\+?[A-Z][A-Z0-9_]*($|[.=])")


def find_config_file(name: str) -> str:
    """The path of a config file.

    Args:
        name: a path; or the name of a config that this library ships, e.g.
            ``configs/detection/mask_rcnn_r50_fpn_4conv1fc.py``; or that of one of Detectron2's
            model zoo, with or without ``model_zoo://``, e.g.
            ``COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml``. The first that exists is used.

    Raises:
        UserError: there is no such file.
    """
    if name.startswith("detectron2://"):
        raise UserError(
            f"{name}: detectron2:// names weights; write a config of the model zoo as "
            "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
        )
    if not name.startswith(_ZOO) and PathManager.isfile(name):
        return name
    if (shipped := find_shipped(name)) is not None:
        return str(shipped)
    path, zoo_name = "", name.removeprefix(_ZOO)
    if not zoo_name.startswith(("/", ".")):
        with contextlib.suppress(RuntimeError):
            path = model_zoo.get_config_file(zoo_name)
    if not PathManager.isfile(path):
        raise UserError(f"no config file {name}{_similar(name)}")
    return path


def _similar(name: str) -> str:
    """A hint that lists shipped configs with a similar name; may be empty."""
    folder = ROOT / os.path.dirname(name)
    if not name.startswith(("configs/", "projects/")) or not folder.is_dir():
        return ""
    names = [path.name for path in folder.glob("*.py")]
    return did_you_mean(os.path.basename(name), names, 3)


def is_yacs(path: str) -> bool:
    """Whether a file is YAML with top-level keys of Detectron2's yacs configs, e.g. ``MODEL``.

    Raises:
        UserError: the file cannot be read.
    """
    if not path.endswith((".yaml", ".yml")):
        return False
    try:
        with PathManager.open(path, "rb") as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    return not {"_BASE_", *get_cfg()}.isdisjoint(_TOP_LEVEL_KEY.findall(text))


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the overrides of a yacs config (``MODEL.MASK_ON=False``) from all others.

    Returns:
        (those whose first part is in upper case, the others).

    Raises:
        UserError: they are not a list.
    """
    if isinstance(overrides, str | Mapping):
        raise UserError(f"overrides={overrides!r}: must be a list of key=value")
    upper = [text for text in overrides if _YACS_OVERRIDE.match(text)]
    return upper, [text for text in overrides if text not in upper]


def read_yacs(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Read a yacs config, with its ``_BASE_`` and Detectron2's defaults.

    Args:
        path: the file.
        overrides: ``KEY=value``; lists are ``[a,b]``, and a list of one may be written as the item.

    Raises:
        UserError: the file or an override has an unknown key or a value of the wrong type.
    """
    cfg = get_cfg()
    try:
        _refuse_code(path)
        cfg.merge_from_file(path)
    except UserError:
        raise
    except Exception as error:  # yacs raises many kinds of exceptions
        reason = " ".join(str(error).strip("'\"").split())
        raise UserError(f"{path} is not a config of Detectron2: {reason}") from error
    return override_yacs(cfg, overrides)


def _refuse_code(path: str) -> None:
    """Refuse YAML that calls what it names, in a file or its ``_BASE_``.

    Detectron2 executes it. Of its own files, only Base-RetinaNet has such an expression, which
    copies of the file may have as well.
    """
    for tag, text in _calls(path):
        if (tag, text) not in _calls_of_detectron2():
            raise UserError(f"{path} runs code when it is read: replace {tag} {text} by its value")


@functools.cache
def _calls_of_detectron2() -> set[tuple[str, str]]:
    return set(_calls(model_zoo.get_config_file("Base-RetinaNet.yaml")))


def _calls(path: str) -> Iterator[tuple[str, str]]:
    """Tags of Python in a YAML file and its ``_BASE_``, each with the text of its node."""
    with PathManager.open(path, "rb") as file:
        text = file.read().decode()
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return  # reported when it is read
    for node in _nodes(root):
        if ":python/" in node.tag:
            yield node.tag, text[node.start_mark.index : node.end_mark.index].strip()
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "_BASE_":
            for base in [value] if isinstance(value, yaml.ScalarNode) else value.value:
                base = os.path.expanduser(base.value)
                absolute = base.startswith(("/", "https://", "http://"))
                yield from _calls(base if absolute else os.path.join(os.path.dirname(path), base))


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is not None:
        yield node
        for child in node.value if isinstance(node, yaml.CollectionNode) else ():
            for part in child if isinstance(child, tuple) else (child,):
                yield from _nodes(part)


def override_yacs(cfg: CfgNode, overrides: Sequence[str]) -> CfgNode:
    """Apply ``KEY=value`` to a yacs config in place, and return it; see :func:`read_yacs`."""
    for text in overrides:
        _override(cfg, text)
    return cfg


def _override(cfg: CfgNode, text: str) -> None:
    key, equals, value = text.removeprefix("+").partition("=")
    if not equals:
        raise UserError(f"override {text!r}: write {key}=VALUE")
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            hint = did_you_mean(key, _keys(cfg), 3)
            raise UserError(f"no key {key!r} in Detectron2's yacs configs{hint}")
        node = node[part]
    try:
        # A string goes through literal_eval once more.
        parsed = _parse(value, node)
        cfg.merge_from_list([key, repr(parsed) if isinstance(parsed, str) else parsed])
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: quote the items of a list, as in ['a','b']") from None
    except ValueError:
        group = isinstance(node, CfgNode)
        what = "is a group, not a value" if group else f"must be of type {type(node).__name__}"
        raise UserError(f"override {text!r}: {key} {what}") from None


def _parse(text: str, old: Any) -> Any:
    """A value of the type of the one that it replaces, if it can be read as one."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = yaml.safe_load(text) if re.match(r"\[|\w+$", text) else text
    if isinstance(old, str) and value is not None:
        value = value if isinstance(value, str) else text
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, list | tuple) and not isinstance(value, list | tuple):
        if value is None:
            raise ValueError("a list is never null")
        return [value]
    return value


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
