"""Command-line overrides of a config, and the types of its values."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from region_pretrain.dataset_names import is_path_name
from region_pretrain.errors import UserError

#: Keys of numbers that may be null.
_NUMBERS = (
    "train.epochs",
    "train.max_iter",
    "train.base_batch_size",
    "train.seed",
    "train.checkpointer.max_to_keep",
    "train.clip_grad.max_value",
)
#: Numbers that need not be whole although their default is, or is null.
_FRACTIONS = (
    "train.epochs",
    "train.clip_grad.max_value",
    "train.checkpoint_minutes",
    "train.tracking.seconds",
)

#: How a path begins that cannot be anything else.
_PATH = re.compile(r"~?/|\.{1,2}/|[A-Za-z]:[\\/]")

#: Counts of a loader and their smallest values.
_LOADER_COUNTS = {"num_workers": 0, "total_batch_size": 1, "batch_size": 1}


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """``LazyConfig.apply_overrides`` that refuses mistyped keys and values of another type.

    Args:
        cfg: changed in place.
        overrides: ``dotted.key=value`` for an existing key, ``+dotted.key=value`` for a new one,
            ``~dotted.key`` to remove one. Values follow Hydra's grammar; text that it does not
            accept, such as ``lr=0.1`` or ``Größe``, is taken literally where the config has text.
            A leading ``~/`` is the home folder.

    Returns:
        ``cfg``.

    Raises:
        UserError: an unknown key (the message names the nearest known ones), a single value for a
            group of keys, a value of another type, a reference without a value, or invalid syntax.
    """
    for text in overrides:
        if text[:1] == "~":
            _remove(cfg, text)
            continue
        key, value, is_new = _parse(cfg, text)
        replace = not is_new and _check_key(cfg, key, value)
        try:
            _check_parents(cfg, key)
            OmegaConf.update(cfg, key, value, merge=not replace)
        except (KeyError, OmegaConfBaseException) as error:
            raise UserError(f"override {text!r}: {str(error).splitlines()[0]}") from None
    for text in filter(lambda text: "${" in text, overrides):  # another may give what it refers to
        _check_interpolation(cfg, text)
    return cfg


def _remove(cfg: DictConfig, text: str) -> None:
    key, equals, _ = text[1:].partition("=")
    if equals:
        raise UserError(f"override {text!r}: write ~{key} to remove the key, or {key}=VALUE")
    _check_known(cfg, key)
    head, _, last = key.rpartition(".")
    parent = OmegaConf.select(cfg, head) if head else cfg
    if not isinstance(parent, DictConfig):
        raise UserError(f"override {text!r}: only keys of groups can be removed")
    del parent[last]


def _check_interpolation(cfg: DictConfig, text: str) -> None:
    try:
        value = OmegaConf.select(cfg, _parse(cfg, text)[0])
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        reason, hint = str(error).splitlines()[0], ""
        if name := next((n for n in re.findall(r"\${(\w+)}", text) if n in os.environ), None):
            hint = f"; write ${{oc.env:{name}}}, or double quotes, in which the shell replaces it"
        raise UserError(f"override {text!r}: {reason}{hint}") from None


def _parse(cfg: DictConfig, text: str) -> tuple[str, Any, bool]:
    """Key, value and whether the key is new."""
    key, equals, raw = text.partition("=")
    is_new = key.startswith("+")
    key = key.removeprefix("+")
    node = _node(cfg, key)
    literal = (
        re.fullmatch(r"[\w.+-]+", key)
        and equals
        and (is_new or _may_be_text(node, key) or is_path_name(raw))
    )
    if literal and raw.startswith("\\\\"):  # a network path of Windows: Hydra halves them
        return key, raw, is_new
    try:
        override = _parsed(text)
    except HydraException as error:
        if literal and raw and raw[0] not in "\"'[{$":
            return key, _expand_home(raw), is_new
        reason = str(error).splitlines()[0].split("Exception: ")[-1]
        raise UserError(
            f"override {text!r} is not of the form key=value (quote strings that contain "
            f"special characters): {reason}"
        ) from None
    if override.is_sweep_override() and literal and _PATH.match(raw):
        return key, _expand_home(raw), is_new  # a folder with a comma in its name
    if override.is_sweep_override():
        raise UserError(f"override {text!r}: write a list as {key}=[a,b], or quote the text")
    value = override.value()
    if isinstance(value, bool | int | float) and isinstance(node, str) and "${" not in node:
        value = raw  # a folder called 20240501
    return override.key_or_group, _expand_home(value), is_new


@functools.lru_cache(1024)
def _parsed(text: str) -> Override:
    """By Hydra, whose parser takes milliseconds: a sweep has the same overrides in many runs."""
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _node(cfg: DictConfig, key: str) -> Any:
    """The value at a key before interpolation; None if there is none."""
    try:
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        last = key.rpartition(".")[2]
        if isinstance(parent, DictConfig) and last in parent:
            return OmegaConf.to_container(parent, resolve=False).get(last)
    except OmegaConfBaseException:
        pass
    return None


def _may_be_text(node: Any, key: str) -> bool:
    return isinstance(node, str | dict) or node is None and key not in _NUMBERS


def _expand_home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value


def _check_parents(cfg: DictConfig, key: str) -> None:
    parts = key.split(".")
    for end in range(1, len(parts)):
        node = OmegaConf.select(cfg, ".".join(parts[:end]), default=None)
        if node is None:
            return
        if not OmegaConf.is_config(node):
            raise KeyError(f"{'.'.join(parts[:end])} is a value, not a group")


def _check_key(cfg: DictConfig, key: str, value: Any) -> bool:
    """Refuse an unknown key or a value that cannot be meant.

    Returns:
        Whether the value replaces a lazily computed one, such as the name of a data set.
    """
    parent, node = _check_known(cfg, key, f"; to add it: +{key}=...")
    part = key.rpartition(".")[2]
    interpolation = isinstance(value, str) and value.startswith("${")
    if isinstance(node, bool) and not isinstance(value, bool | None) and not interpolation:
        raise UserError(f"{key}={value}: must be true or false")
    number = isinstance(node, int | float) and not isinstance(node, bool) or key in _NUMBERS
    if number and isinstance(value, str | bool) and not interpolation:
        raise UserError(f"{key}={value}: must be a number")
    kind = None if interpolation else _kind_of_argument(parent, part)
    if kind is not None:
        _check_argument(key, node, value, kind)
    # A value that the config computes lazily, such as a data set's name, may be replaced by text or
    # a list.
    computed = isinstance(node, DictConfig) and "_target_" in node and "." in key
    if isinstance(value, str) and kind and not re.search("str|Any|object", kind):
        computed = False
    scalar = isinstance(value, int | float) or isinstance(value, str) and not computed
    if isinstance(node, DictConfig) and scalar:
        keys = ", ".join(f"{key}.{k}" for k in list(node.keys())[:6])
        raise UserError(f"{key} is a group, not a value; its keys: {keys}")
    return computed and not isinstance(value, dict)


def _check_known(cfg: DictConfig, key: str, mend: str = "") -> tuple[Any, Any]:
    """The group of a key, and its value."""
    node: Any = cfg
    parent: Any = None
    for part in key.split("."):
        parent = node
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in list(node.keys()):
            node = node._get_node(part) if OmegaConf.is_missing(node, part) else node[part]
        else:
            raise UserError(f"no key {key!r} in the config{_hint(cfg, key)}{mend}")
    return parent, node


def target_of(node: Any) -> Any:
    """What a node of a config calls when it is instantiated; None for other nodes."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def _kind_of_argument(lazy: Any, name: str) -> str | None:
    """The type of an argument of a lazy object; empty if it states none, None if not an argument.

    A default of None is part of the type.
    """
    try:
        argument = inspect.signature(target_of(lazy)).parameters[name]
    except Exception:  # an import of the user's code may raise anything
        return None
    kind = argument.annotation
    kind = "" if kind is argument.empty else kind if isinstance(kind, str) else repr(kind)
    return f"{kind} | None" if argument.default is None else kind


def _check_argument(key: str, node: Any, value: Any, kind: str) -> None:
    """Refuse null for a number or a data set's name, and a single value for a list."""
    last = key.rpartition(".")[2].lower()
    number = isinstance(node, int | float) and not isinstance(node, bool)
    must = ""
    if value is None and last == "names":
        must = "name a data set"
    elif value is None and number and last != "num_classes":  # null follows the data
        must = "" if re.search("None|Optional", kind) else "be a number"
    elif isinstance(node, ListConfig) and isinstance(value, str):
        numbers = all(isinstance(item, int | float | ListConfig) for item in node)
        must = "be a list of numbers" if node and numbers else ""
    elif isinstance(node, ListConfig) and isinstance(value, int | float):
        while (outer := re.sub(r"\[[^][]*\]", "", kind)) != kind:  # tuple[float, float] -> tuple
            kind = outer
        is_list = re.search("(?i)tuple|list|sequence", kind)
        must = "be a list" if is_list and not re.search("int|float|Any|Union|Opt", kind) else ""
    if must:
        raise UserError(f"{key}={'null' if value is None else value}: must {must}")


def check_values(cfg: DictConfig, defaults: DictConfig) -> None:
    """Compare the values of ``train`` and of the loaders with what they must be.

    Args:
        cfg: a config whose ``train`` is complete.
        defaults: ``train`` of ``configs/common/train.py``.

    Raises:
        UserError: a key of ``train`` has a value of another type than its default, a number there
            is negative, a count there or of a loader is not a whole number, gradients are clipped
            to 0, or ``train.checkpointer`` has an unknown key.
    """
    _check_types("train", defaults, cfg.train)
    clip = cfg.train.clip_grad
    name = "max_norm" if clip.max_value is None else "max_value"
    if clip.enabled and clip[name] == 0:
        raise UserError(f"train.clip_grad.{name}=0: must be positive; enabled=false does not clip")
    known = list(defaults.checkpointer)
    for name in set(cfg.train.checkpointer) - set(known):
        raise UserError(f"train.checkpointer.{name}: there is no such key; it has {known}")
    for split, loader in cfg.get("dataloader", {}).items():
        for name, least in _LOADER_COUNTS.items():
            value = loader.get(name) if isinstance(loader, DictConfig) else None
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise UserError(
                    f"dataloader.{split}.{name}={value}: must be a whole number, at least {least}"
                )


def _check_types(key: str, defaults: DictConfig, given: DictConfig) -> None:
    for name, default in defaults.items():
        path, value = f"{key}.{name}", given[name]
        if isinstance(default, DictConfig) and isinstance(value, DictConfig):
            _check_types(path, default, value)
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if default is None or path in _NUMBERS:
            right, must = value is None or path not in _NUMBERS or number, "a number or null"
        elif isinstance(default, bool):
            right, must = isinstance(value, bool), "true or false"
        elif isinstance(default, int | float):
            right, must = number, "a number"
        elif isinstance(default, str):
            right, must = isinstance(value, str) or path == "train.device" and value is None, "text"
        elif isinstance(default, ListConfig):
            right, must = isinstance(value, ListConfig | list | tuple), "a list"
        else:
            right, must = False, "a group of keys"
        if not right:
            raise UserError(f"{path}={'null' if value is None else value}: must be {must}")
        if number and value < 0:
            raise UserError(f"{path}={value}: must not be negative")
        count = isinstance(default, int) or path in _NUMBERS
        if number and count and path not in _FRACTIONS and not isinstance(value, int):
            raise UserError(f"{path}={value}: must be a whole number")


def _hint(cfg: DictConfig, key: str) -> str:
    known = list(dotted_keys(OmegaConf.to_container(cfg, resolve=False)))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == last and k not in near][:3]
    return f"; did you mean {', '.join(near)}?" if near else ""


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested dicts and lists in dotted form, including the keys of groups."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return
    for key, child in items:
        yield f"{prefix}{key}"
        yield from dotted_keys(child, f"{prefix}{key}.")
