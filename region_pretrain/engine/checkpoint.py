"""Checkpoints of a run: written atomically, resumed exactly, the detector stored separately."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from region_pretrain.convert.facts import facts_of
from region_pretrain.engine.checkpoint_file import (
    DamagedCheckpoint,
    plain,
    plain_hooks,
    read_run_checkpoint,
)
from region_pretrain.engine.extra_state import (
    hook_states,
    load_hook_states,
    loss_normalizers,
    set_loss_normalizers,
)
from region_pretrain.engine.fingerprint import Fingerprint
from region_pretrain.engine.processes import on_main_process
from region_pretrain.errors import UserError, describe, first_few
from region_pretrain.files import (
    is_disk_full,
    is_local,
    remove_parts,
    write_atomic,
    write_text_atomic,
)
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.random_state import get_random_state, set_random_state

logger = logging.getLogger(__name__)

FINAL = "model_final"
_NAME = re.compile(r"model_(\d{7,}|final)\.pth")


def checkpoint_name(iteration: int) -> str:
    """Detectron2's name (without ``.pth``) of the checkpoint after a 0-based iteration."""
    return f"model_{iteration:07d}"


def split_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a model's state dict into the detector's entries and all others.

    Args:
        model: a detector, or a ``PretrainingModel``, whose ``detector_modules`` names the
            submodules that belong to the detector.

    Returns:
        (detector's entries, other entries), under the model's names.
    """
    state = model.state_dict()
    if not isinstance(model, PretrainingModel):
        return dict(state), {}
    prefixes = tuple(f"{name}." for name in model.detector_modules)
    detector = {k: v for k, v in state.items() if k.startswith(prefixes)}
    return detector, {k: v for k, v in state.items() if k not in detector}


class RunCheckpointer(DetectionCheckpointer):
    """Saves and resumes runs.

    A file is a dict that ``torch.load(weights_only=True)`` reads:

    - ``model``: the detector under the stock detector's names, so that a plain
      ``DetectionCheckpointer(detector).load(file)`` fills it;
    - ``pretraining``: all other entries of the model's state dict (target network, heads, queue);
    - one entry per checkpointable (``optimizer``, ``scheduler``, ``scaler``);
    - ``hooks``: states of the hooks that have one;
    - ``iteration``: last finished iteration (0-based); a resumed run starts at the next one;
    - ``rng``: random states, one entry per rank;
    - ``run``: properties of the run that the schedule depends on;
    - ``data``: a :class:`~region_pretrain.engine.fingerprint.Fingerprint` of the training data;
    - ``detector``: what the weights presume, see :class:`~region_pretrain.convert.facts.Facts`;
    - ``thing_classes``: the names of a detector's classes, if they are known.

    Args:
        model: with or without DDP.
        save_dir: the run's output folder.
        run: values that must not change on resume: ``max_iter``, ``total_batch_size``,
            ``world_size``.
        allow_world_size_change: resume even if the number of processes differs. The images and
            their global order stay the same, the latter except in batches that are grouped by
            aspect ratio; the random numbers that a process draws do not.
        classes: names of the detector's classes; empty if unknown.
        allow_new_length: resume even if ``max_iter`` differs; the schedules become those of the new
            length.
        fingerprint: of the training data; None if it is not compared.
        checkpointables: objects with ``state_dict`` and ``load_state_dict``; None is left out.

    Attributes:
        saved: path of the file that this process has written last; "" before the first one.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        run: dict[str, int],
        allow_world_size_change: bool = False,
        classes: Sequence[str] = (),
        allow_new_length: bool = False,
        fingerprint: Fingerprint | None = None,
        **checkpointables: Any,
    ) -> None:
        given = {name: obj for name, obj in checkpointables.items() if obj is not None}
        super().__init__(model, save_dir, **given)
        self.run = dict(run)
        self.allow_world_size_change = allow_world_size_change
        self.classes = list(classes)
        self.allow_new_length = allow_new_length
        self.fingerprint = fingerprint
        self.trainer: TrainerBase | None = None  # set once it exists; has the hooks' states
        self.saved = ""
        self._random_state: dict[str, Any] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and point ``last_checkpoint`` to it.

        All processes must call this: each contributes its random state. The main one writes.

        Args:
            name: file name without ``.pth``.
            kwargs: further entries, at least ``iteration``.

        Raises:
            UserError: the disk is full, or a hook's state cannot be saved; earlier checkpoints are
                intact.
        """
        states = comm.gather(get_random_state())
        normalizers = comm.gather(loss_normalizers(self.model))
        if not self.save_dir or not self.save_to_disk:
            return
        detector, pretraining = split_state(self.model)
        data = {"model": detector, "pretraining": pretraining}
        data |= {key: plain(obj.state_dict()) for key, obj in self.checkpointables.items()}
        hooks = plain_hooks(hook_states(self.trainer._hooks) if self.trainer else {})
        if any(normalizers):
            data["loss_normalizers"] = normalizers
        data |= {"hooks": hooks, "rng": states, "run": self.run, **kwargs}
        if self.classes:
            data["thing_classes"] = self.classes
        if self.fingerprint is not None:
            data["data"] = self.fingerprint.entry(kwargs["iteration"])
        data["detector"] = facts_of(self.model).to_dict()

        path = os.path.join(self.save_dir, f"{name}.pth")
        try:
            write_atomic(path, lambda f: torch.save(data, f))
            self.tag_last_checkpoint(f"{name}.pth")
        except Exception as error:
            full = is_disk_full(error)
            if not full and not isinstance(error, OSError):
                raise
            reason = f"no space left for {path}" if full else f"cannot write {path}: {error}"
            raise UserError(
                f"{reason}; last good checkpoint: {self.last_good() or 'none'}. "
                f"{'Free some disk space' if full else 'Fix this'} and continue with --resume"
            ) from error
        self.saved = path
        logger.info("saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text_atomic(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """Path of the file that ``last_checkpoint`` names; "" if it names none."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        try:
            with PathManager.open(path, "rb") as file:
                name = file.read().decode().strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("%s cannot be read: %s", path, describe(error))
            return ""
        if not re.fullmatch(r"[\w.-]+\.pth", name):
            logger.warning("%s does not name a checkpoint", path)
            return ""
        return os.path.join(self.save_dir, name)

    def last_good(self) -> str:
        """Path of the checkpoint that ``last_checkpoint`` names; "" if it does not exist."""
        path = self.get_checkpoint_file()
        return path if path and PathManager.exists(path) else ""

    def numbered(self) -> list[tuple[int, str]]:
        """(iteration, path) of each ``model_NNNNNNN.pth``, in ascending order."""
        found = [_NAME.fullmatch(name) for name in PathManager.ls(self.save_dir)]
        return sorted(
            (int(m[1]), os.path.join(self.save_dir, m[0])) for m in found if m and m[1] != "final"
        )

    def remove_old(self, max_to_keep: int | None, keep_every: int) -> None:
        """Delete numbered checkpoints.

        Args:
            max_to_keep: number of newest files to keep; None keeps all.
            keep_every: also keep the files written after each multiple of this many iterations;
                0 keeps none.
        """
        if max_to_keep is None or not self.save_to_disk:
            return
        for iteration, path in self.numbered()[:-max_to_keep]:
            if path != self.saved and (not keep_every or (iteration + 1) % keep_every):
                PathManager.rm(path)

    def resume(self) -> int:
        """Load everything in the newest readable checkpoint of ``save_dir``.

        :meth:`restore_random_state` sets the random state, right before the first step.

        Returns:
            The iteration to continue with; 0 if there is no checkpoint yet.

        Raises:
            UserError: no checkpoint is readable, or it belongs to another model or schedule.
        """
        newest = {}  # path -> content, on the main process

        def find() -> str | None:
            path, data = self._newest_readable()
            newest[path] = data
            return path

        path = on_main_process(find)
        if not path:
            logger.warning("no checkpoint in %s yet: starting from iteration 0", self.save_dir)
            return 0
        data = newest.pop(path, None) or read_run_checkpoint(path)
        if self.fingerprint is not None:
            saved = data.get("data"), data["iteration"]
            on_main_process(lambda: self.fingerprint.compare(path, *saved))
        self._check_run(path, data["run"])
        if data.get("thing_classes", self.classes) != self.classes:
            raise UserError(
                f"{path} was written for the classes {', '.join(data['thing_classes'])}, now the "
                f"data has {', '.join(self.classes)}: choose another train.output_dir"
            )
        self._load_model_state(path, {**data["model"], **data["pretraining"]})
        rates = self._base_rates()
        for key, obj in self.checkpointables.items():
            if key == "scaler" and key not in data:
                logger.warning(
                    "%s was written on a device without a loss scale: starting one", path
                )
                continue
            if key not in data:
                raise UserError(f"{path} is not a checkpoint of such a run: it has no {key}")
            with _of_another_run(path, key):
                obj.load_state_dict(data[key])
        if self.trainer:
            self.trainer.iter = data["iteration"]
            with _of_another_run(path, "hooks"):
                load_hook_states(self.trainer._hooks, data["hooks"])
        saved = data.get("loss_normalizers", ())
        set_loss_normalizers(self.model, saved, comm.get_rank(), comm.get_world_size())
        if rates != self._base_rates() or data["run"].get("max_iter") != self.run.get("max_iter"):
            self._restart_schedule(rates)
        if len(data["rng"]) == comm.get_world_size():
            self._random_state = data["rng"][comm.get_rank()]
        logger.info("resuming %s after iteration %d", path, data["iteration"])
        return data["iteration"] + 1

    def _base_rates(self) -> list[float]:
        scheduler = self.checkpointables.get("scheduler")
        return list(getattr(scheduler, "base_lrs", []))

    def _restart_schedule(self, rates: list[float]) -> None:
        """Learning rates of the new length, from the config's base rates."""
        scheduler, optimizer = (self.checkpointables.get(k) for k in ("scheduler", "optimizer"))
        if not rates or optimizer is None:
            return
        scheduler.base_lrs = rates
        for group, rate in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate

    def restore_random_state(self) -> None:
        """Set the random state that :meth:`resume` read, if any. Only the first call has effect."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def _newest_readable(self) -> tuple[str | None, dict[str, Any] | None]:
        """The file that ``last_checkpoint`` names if it is intact, else the newest intact one.

        Returns:
            (its path, its content); None if there is no checkpoint.
        """
        if is_local(self.save_dir) and not os.path.isdir(self.save_dir):
            return None, None
        remove_parts(self.save_dir)
        tagged = self.get_checkpoint_file()
        final = os.path.join(self.save_dir, f"{FINAL}.pth")
        numbered = {path: iteration for iteration, path in reversed(self.numbered())}
        present = {path for path in (tagged, final) if path and PathManager.exists(path)}
        if tagged in present and (data := _intact(tagged)) is not None:
            return tagged, data
        if tagged and tagged not in present:
            logger.warning("%s is missing; looking for an earlier checkpoint", tagged)
        # If a finished run was extended, later files are newer.
        last = _intact(final) if final in present and final != tagged else None
        for path, iteration in numbered.items():
            if last is not None and last["iteration"] >= iteration:
                break
            if path != tagged and (data := _intact(path)) is not None:
                return path, data
        if last is not None:
            return final, last
        if present := present.union(numbered):
            raise UserError(
                f"none of the {len(present)} checkpoints in {self.save_dir} is readable; "
                "remove them to start over"
            )
        return None, None

    def _check_run(self, path: str, run: dict[str, int]) -> None:
        for key in self.run.keys() & run.keys():
            if self.run[key] == run[key]:
                continue
            if key == "world_size" and self.allow_world_size_change:
                logger.warning(
                    "%s was written by %d processes, now there are %d: the images stay the same, "
                    "and in batches that are not grouped by aspect ratio their global order, but "
                    "rounding and the model's own random numbers differ",
                    path,
                    run[key],
                    self.run[key],
                )
                continue
            new_data = self.fingerprint is not None and self.fingerprint.allow_changed_data
            longer = self.allow_new_length and self.run[key] > run[key]
            if key == "max_iter" and (longer or new_data):
                logger.info("%s: %d iterations become %d", path, run[key], self.run[key])
                continue
            if key == "max_iter":
                mend = "set train.allow_new_length=True to make the run longer, or "
                if self.run[key] < run[key]:
                    mend = "a run cannot become shorter: "
                raise UserError(
                    f"{path} was written with {key}={run[key]}, now it is {self.run[key]}: {mend}"
                    "choose another train.output_dir"
                )
            if key == "world_size":
                raise UserError(
                    f"{path} was written by {run[key]} processes, now there are {self.run[key]}, "
                    f"so the run would not continue exactly: start {run[key]} processes, or set "
                    "train.allow_world_size_change=True to continue with the same images"
                )
            raise UserError(
                f"{path} was written with {key}={run[key]}, now it is {self.run[key]}: "
                "the schedule or the data set has changed; choose another train.output_dir"
            )

    def _load_model_state(self, path: str, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            faults = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
            text = first_few(faults, 3, "; ")
            raise UserError(f"{path} belongs to another model: {text}") from error


@contextlib.contextmanager
def _of_another_run(path: str, entry: str) -> Iterator[None]:
    """Report the state of another model, optimiser or hook as a :class:`UserError`."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} belongs to another run, its {entry} cannot be restored: {describe(error)}; "
            "remove it to continue from the checkpoint before it"
        ) from error


def _intact(path: str) -> dict[str, Any] | None:
    """The content of a run's checkpoint; None, with a warning, if it is damaged."""
    try:
        return read_run_checkpoint(path)
    except DamagedCheckpoint as error:
        logger.warning("%s; trying the checkpoint before it", error)
        return None
