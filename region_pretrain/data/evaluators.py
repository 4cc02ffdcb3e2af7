"""The evaluators of a detection config, before they are built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from omegaconf import DictConfig, ListConfig

from region_pretrain.overrides import target_of
from region_pretrain.yacs.build import build_evaluator, evaluator_classes


@dataclass(frozen=True)
class LazyEvaluator:
    """One evaluator.

    Attributes:
        key: where the config has it, such as ``dataloader.evaluator.1``.
        lazy: its node.
        target: what the node calls.
    """

    key: str
    lazy: DictConfig
    target: Any

    def classes(self, name: str) -> list[Any]:
        """The classes that evaluate a data set; of a function of the user's own, the function."""
        return evaluator_classes(name) if self.target is build_evaluator else [self.target]

    def is_a(self, kind: type, name: str) -> bool:
        """Whether one of the classes that evaluate a data set is ``kind`` or derived from it."""
        return any(isinstance(c, type) and issubclass(c, kind) for c in self.classes(name))


def evaluators_of(cfg: DictConfig) -> list[LazyEvaluator]:
    """The evaluators in ``dataloader.evaluator``: one, a list, or Detectron2's group of several."""
    return list(_visit(cfg.dataloader.get("evaluator"), "dataloader.evaluator"))


def is_evaluated_by(cfg: DictConfig, kind: type, name: str) -> bool:
    """Whether an evaluator of a config is a ``kind``, if the data set is its test set."""
    return any(evaluator.is_a(kind, name) for evaluator in evaluators_of(cfg))


def coco_evaluator_of(cfg: DictConfig, name: str, task: str) -> str | None:
    """Key of a ``COCOEvaluator`` that computes the AP of a task, such as ``segm``, if there is one.

    Args:
        cfg: a detection config.
        name: the test set.
        task: one that the detector predicts, which is evaluated unless ``tasks`` leaves it out.
    """
    for evaluator in evaluators_of(cfg):
        tasks = evaluator.lazy.get("tasks")
        if evaluator.is_a(COCOEvaluator, name) and (tasks is None or task in tasks):
            return evaluator.key
    return None


def _visit(node: Any, key: str) -> Iterator[LazyEvaluator]:
    if isinstance(node, ListConfig):
        for number, child in enumerate(node):
            yield from _visit(child, f"{key}.{number}")
    elif isinstance(node, DictConfig):
        target = target_of(node)
        if isinstance(target, type) and issubclass(target, DatasetEvaluators):
            yield from _visit(node.get("evaluators"), f"{key}.evaluators")
        elif target is not None:
            yield LazyEvaluator(key, node, target)
