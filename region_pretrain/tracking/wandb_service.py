"""Weights & Biases. Its settings are those of its environment variables (``WANDB_*``)."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from glob import escape, glob

from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.tracking.service import PROJECT, Row, RunInfo, Service, TrackedRun, new_id


class WandbService(Service):
    """A run of Weights & Biases; its step is the iteration.

    The service's history only grows: after resuming from an earlier checkpoint, it keeps the values
    that it already has.
    """

    name = "wandb"

    def __init__(self, info: RunInfo, report: Callable[[str, str], None]) -> None:
        super().__init__(info, report)
        import wandb

        self._wandb = wandb
        self._run = None
        self._failed = False
        settings = wandb.setup(wandb.Settings(quiet=True)).settings
        self._mode = "offline" if settings._offline else settings.mode
        if self._mode == "online":
            try:
                wandb.login(verify=False)
            except wandb.errors.UsageError as error:
                raise UserError(
                    f"Weights & Biases: {error} Or set WANDB_MODE=offline, and upload the run later"
                ) from error

    def open(self, last_try: bool) -> int:
        info, wandb = self.info, self._wandb
        tracked = self.tracked() or TrackedRun(new_id())
        self.remember(tracked)
        # An attempt that was killed while it tried to connect has left nothing but the id.
        written = os.path.join(escape(info.output_dir), "wandb", f"offline-run-*-{tracked.id}")
        logged = info.logged if tracked.url or glob(written) else -1
        # What cannot be uploaded any more is written to the folder, to be uploaded by `wandb sync`.
        mode = "offline" if last_try and self._mode == "online" else self._mode
        if self._failed:  # its background process still holds the id
            wandb.teardown(exit_code=1)
        self._failed = True
        self._run = wandb.init(
            project=info.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=info.output_dir,
            id=tracked.id,
            name=info.name,
            group=info.group,
            tags=list(info.tags),
            config={**info.config, "git": info.git},
            allow_val_change=True,
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                quiet=True,
                init_timeout=info.seconds / 2,
                finish_timeout=info.seconds,
                x_stats_pid=info.pid,
            ),
        )
        self._failed = False
        if mode != "online":
            self.report("info", f"Weights & Biases: {mode}, run {tracked.id} in {info.output_dir}")
            return logged
        self.report("info", f"Weights & Biases: {self._run.url}")
        self.remember(TrackedRun(tracked.id, self._run.url))
        return self._run.step - 1

    def log(self, iteration: int, row: Row, time: float) -> None:
        self._run.log(row, step=iteration)

    def log_picture(self, iteration: int, name: str, png: bytes) -> None:
        picture = self._wandb.Image(Image.open(io.BytesIO(png)))
        self._run.log({name: picture}, step=iteration)

    def log_checkpoint(self, path: str, sha256: str) -> None:
        self._run.summary[f"checkpoints/{os.path.basename(path)}"] = f"{path} sha256:{sha256}"

    def upload(self, path: str) -> None:
        self._run.log_artifact(path, name=f"model-{self._run.id}", type="model")

    def close(self, finished: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if finished else 1)
