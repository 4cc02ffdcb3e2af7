"""A run small enough for tests: everything that a real one has, in milliseconds per step."""

from __future__ import annotations

import atexit
import io
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from omegaconf import OmegaConf
from torch import distributed as dist
from torch import nn

from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.preemption import StopRequest
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import on_main_process
from region_pretrain.errors import Stopped, UserError
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.solver import (
    LARS,
    cosine_momentum,
    pretrain_param_groups,
    warmup_cosine,
    warmup_multistep,
)

#: What is not the same in two runs of one computation.
CLOCK = {"time", "data_time", "img_per_sec", "peak_memory_mib"}


def final_checkpoint(folder: Path) -> dict:
    """``model_final.pth`` without the measurements of time and memory."""
    data = torch.load(folder / "model_final.pth", weights_only=True)
    metrics = data["hooks"]["MetricsHook"]["metrics"]
    assert CLOCK <= metrics.keys()
    for name in CLOCK:
        del metrics[name]
    return data


@dataclass
class Batch:
    """(B, 6) vectors; splits and moves like a ``ViewBatch``."""

    x: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device) -> Batch:
        return Batch(self.x.to(device))

    def chunk(self, n: int) -> list[Batch]:
        return [Batch(x) for x in self.x.tensor_split(n)]


class Loader:
    """Batch t is a function of (seed, t), divided among the processes."""

    def __init__(self, total_batch_size: int = 8, num_images: int = 40, seed: int | None = 0):
        self.total_batch_size = total_batch_size
        self.iterations_per_epoch = num_images // total_batch_size
        self.seed = seed

    def iterate(self, start_iter: int, stop_iter: int) -> Iterator[Batch]:
        torch.rand(1)  # like loaders that draw from the global generator when they start
        for t in range(start_iter, stop_iter):
            rng = np.random.default_rng((self.seed, t))
            x = rng.normal(size=(self.total_batch_size, 6)).astype(np.float32)
            rank, world = comm.get_rank(), comm.get_world_size()
            share = self.total_batch_size // world
            yield Batch(torch.from_numpy(x[rank * share : (rank + 1) * share]))


class TinyMethod(PretrainingModel):
    """A small BYOL: an online network, its EMA, a queue buffer, and optional random noise."""

    detector_modules = ("backbone",)

    def __init__(self, noise: float = 0.0, norm: str = "", width: int = 5):
        super().__init__()
        norms = {"": nn.Identity, "BN": nn.BatchNorm1d, "SyncBN": nn.SyncBatchNorm}
        self.backbone = nn.Sequential(nn.Linear(6, width), norms[norm](width), nn.Tanh())
        self.target = MomentumCopy({"net": self.backbone})
        self.predictor = nn.Linear(width, width)
        self.register_buffer("queue", torch.zeros(4, width))
        self.noise = noise
        self.momentum = cosine_momentum(0.9)

    def before_step(self, iteration: int, max_iter: int) -> None:
        self.target.ema_update(self.momentum(iteration / max_iter))

    def after_step(self, iteration: int, max_iter: int) -> None:
        self.queue[iteration % 4] = self.backbone[0].bias.detach()

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        x = batch.x + self.noise * (torch.randn_like(batch.x) + random.random() + np.random.rand())
        p = self.predictor(self.backbone(x))
        with torch.no_grad():
            z = self.target["net"](batch.x) + self.queue.mean(0)
        get_event_storage().put_scalar("online/embedding_std", p.std())
        return {"loss_main": (p - z).square().mean(), "loss_l2": 1e-3 * p.square().mean()}


class Unfinished(PretrainingModel):
    """A method whose author has not written everything that a method needs."""

    detector_modules = ("backbone",)


class KillAt(HookBase):
    """Ends the process without warning, in the middle of a run."""

    def after_step(self) -> None:
        if self.trainer.iter == int(os.environ.get("KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)


class StopAt(HookBase):
    """Ends the training as Ctrl-C does."""

    def after_step(self) -> None:
        if self.trainer.iter == int(os.environ.get("STOP_AT", "-1")):
            raise KeyboardInterrupt


class TellAt(HookBase):
    """Signals the last process to stop, as a scheduler does; the others must stop as well."""

    def after_step(self) -> None:
        last = comm.get_rank() == comm.get_world_size() - 1
        if last and self.trainer.iter == int(os.environ.get("TELL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGUSR2)


class KillInSave(HookBase):
    """Ends the process while it writes a checkpoint: half of the file is there."""

    def after_step(self) -> None:
        if self.trainer.iter == int(os.environ.get("KILL_AT", "-1")):
            save = torch.save

            def half(data, f):
                buffer = io.BytesIO()
                save(data, buffer)
                f.write(buffer.getvalue()[: buffer.tell() // 2])
                f.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = half


class Poison(HookBase):
    """Makes a weight NaN before an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            with torch.no_grad():
                self.trainer.module.predictor.bias[0] = float("nan")


def make_config(output_dir, **train) -> OmegaConf:
    """A pre-training config; keyword arguments replace keys of ``train``."""
    train = {
        "output_dir": str(output_dir),
        "seed": 0,
        "epochs": 4,  # 4 * 40 images / 8 = 20 iterations
        "base_batch_size": 16,
        "device": "cpu",
        "log_period": 1,
        "checkpointer": {"period": 6, "max_to_keep": 2},
        **train,
    }
    return OmegaConf.create(
        {
            "model": L(TinyMethod)(noise=0.1),
            "dataloader": {"train": L(Loader)(total_batch_size=8, seed="${train.seed}")},
            "optimizer": L(LARS)(params=L(pretrain_param_groups)(weight_decay=1e-3), lr=2.0),
            "lr_multiplier": L(warmup_cosine)(epochs="${train.epochs}", warmup_epochs=1),
            "train": train,
        },
        flags={"allow_objects": True},
    )


class TinyDetector(nn.Module):
    """Takes lists of dicts, has batch norm, and draws random numbers as RoI heads do."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.roi_heads = nn.Linear(4, 1)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        y = self.roi_heads(self.backbone(torch.stack([d["x"] for d in batch])))[:, 0]
        if not self.training:
            return [{"y": v.item()} for v in y]
        goal = torch.stack([d["x"].sum() for d in batch])
        return {"loss_y": ((y - goal).square() * torch.rand_like(y)).mean()}


class NoisyMapper:
    """Adds noise from the global generators, as Detectron2's augmentations do."""

    def __init__(self, scale: float = 0.1):
        self.scale = scale

    def __call__(self, record: dict) -> dict:
        noise = np.random.randn() + random.random() + torch.rand(1)
        x = torch.tensor([record["image_id"] / 10, 1.0, 0.0])
        return {**record, "x": x + self.scale * noise}


def records(count: int = 10) -> list[dict]:
    """Every third image is tall."""
    return [{"image_id": i, "width": 4, "height": 5 if i % 3 == 0 else 3} for i in range(count)]


class MeanOutput(DatasetEvaluator):
    """Its AP is the mean output; NaN stands for a class without boxes."""

    def reset(self) -> None:
        self.values = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.values += [output["y"] for output in outputs]

    def evaluate(self) -> dict:
        return {"bbox": {"AP": float(np.mean(self.values)), "AP-none": float("nan")}}


class FailingMean(MeanOutput):
    """Raises an error in the evaluations at some iterations.

    Args:
        process, evaluate: iteration of the evaluation -> rank on which this method fails.
    """

    def __init__(self, process: dict, evaluate: dict):
        self._fails = {"process": dict(process), "evaluate": dict(evaluate)}

    def _run(self, method: str) -> None:
        if self._fails[method].get(get_event_storage().iter) == comm.get_rank():
            raise KeyError("area")

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self._run("process")
        super().process(inputs, outputs)

    def evaluate(self) -> dict | None:
        gathered = comm.gather(self.values)
        self._run("evaluate")
        if not comm.is_main_process():
            return None
        self.values = [value for values in gathered for value in values]
        return super().evaluate()


def make_detection_config(output_dir, **train) -> OmegaConf:
    """A fine-tuning config in Detectron2's form."""
    return OmegaConf.create(
        {
            "model": L(TinyDetector)(),
            "dataloader": {
                "train": L(build_detection_train_loader)(
                    dataset=L(records)(),
                    mapper=L(NoisyMapper)(),
                    total_batch_size=4,
                    num_workers=0,
                ),
                "test": L(build_detection_test_loader)(
                    dataset=L(records)(count=5), mapper=L(NoisyMapper)(scale=0.0), num_workers=0
                ),
                "evaluator": L(MeanOutput)(),
            },
            "optimizer": L(torch.optim.SGD)(
                params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.02, momentum=0.9
            ),
            "lr_multiplier": L(warmup_multistep)(max_iter=12, steps=[8], warmup_iters=2),
            "train": {
                "output_dir": str(output_dir),
                "max_iter": 12,
                "device": "cpu",
                "log_period": 1,
                "eval_period": 3,
                "checkpointer": {"period": 4, "max_to_keep": None},
                "precise_bn": {"enabled": True, "num_iter": 2},
                **train,
            },
        },
        flags={"allow_objects": True},
    )


def fine_tune_in_process(output_dir: str, process: dict, evaluate: dict) -> None:
    """Fine-tuning with failing evaluations, in one of the processes of a test."""
    cfg = make_detection_config(output_dir, eval_period=3)
    cfg.dataloader.evaluator = L(FailingMean)(process=process, evaluate=evaluate)
    do_train(cfg)


def train_in_process(
    output_dir: str,
    resume: bool,
    train: dict | None = None,
    model: dict | None = None,
    loader: dict | None = None,
) -> None:
    """What the processes of a test run."""
    cfg = make_config(output_dir, **(train or {}))
    cfg.model.update(model or {})
    cfg.dataloader.train.update(loader or {})
    do_pretrain(cfg, resume)


def refuse(message: str) -> None:
    """A user error that every process finds."""
    raise UserError(message)


def fail_on_second() -> None:
    """An error in one process only."""
    if comm.get_rank() == 1:
        raise ValueError("rank 1 broke")
    comm.synchronize()


def gloo_threads() -> int:
    """Number of gloo threads in this process; each keeps Python tensors alive."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return sum(name == "pt_gloo_runloop" for name in names)


def use_all_groups_and_end(folder: str, how: str) -> None:
    """Create every kind of group that a run has, and end in one of the ways that runs end.

    When the process exits, ``folder/RANK`` is written: whether there were gloo threads in here, and
    how many are left.
    """
    path, stop = os.path.join(folder, str(comm.get_rank())), StopRequest()
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model.itself = model  # cyclic garbage, like hooks and trainers
    model(torch.ones(1, 2)).sum().backward()
    assert not (stop.agreed() or stop.agreed())
    comm.all_gather(1)
    on_main_process(int)
    inside = gloo_threads()

    @atexit.register
    def write() -> None:
        with open(path, "w") as f:
            f.write(f"{inside > 0} {gloo_threads()}")

    if how == "stopped":
        raise Stopped
    if how == "refused":
        raise UserError("fix train.x")


def refuse_on_main_process(folder: str) -> None:
    """Each process writes what it learns of the main process's result, and then of its error."""
    path = os.path.join(folder, str(comm.get_rank()))
    result = on_main_process(lambda: f"from {comm.get_rank()}")
    try:
        on_main_process(lambda: refuse(f"refused by {comm.get_rank()}"))
    except UserError as error:
        result += f", {error}"
    with open(path, "w") as f:
        f.write(result)


def write_threads(folder: str) -> None:
    """Write the number of this process's threads to a file."""
    Path(folder, str(comm.get_rank())).write_text(str(torch.get_num_threads()))


def write_ranks(folder: str) -> None:
    """Write a file that identifies this process."""
    total = sum(comm.all_gather(comm.get_rank() + 1))
    text = f"{comm.get_rank()}/{comm.get_world_size()} local {comm.get_local_rank()} sum {total}"
    with open(os.path.join(folder, str(comm.get_rank())), "w") as f:
        f.write(f"{text} {dist.get_backend()}")
