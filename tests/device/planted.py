"""Faults that the simulated device must find, one at a time: ``python planted.py OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from collectives import DeviceGroup
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from simulated import Simulation, install
from steps import train
from torch import Tensor, nn
from torch import distributed as dist

from region_pretrain.config import complete_train
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.solver import pretrain_param_groups


class Faulty(PretrainingModel):
    """A linear layer whose loss does one thing that it must not do."""

    detector_modules = ("backbone",)

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.backbone = nn.Linear(12, 4)
        self.fault = fault
        if fault == "unused parameter":
            self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, batch: ViewBatch) -> dict[str, Tensor]:
        y = self.backbone(batch.views[0].images.flatten(1) / 255)
        if self.fault in FAULTS:
            FAULTS[self.fault](y)
        return {"loss": y.float().square().mean()}


FAULTS = {
    "item": lambda y: y.sum().item(),
    "bool": lambda y: bool(y.sum() > 0),
    "int": lambda y: int(y.sum()),
    "tolist": lambda y: y.detach().tolist(),
    "cpu": lambda y: y.detach().cpu(),
    "nonzero": lambda y: (y > 0).nonzero(),
    "mask index": lambda y: y[y > 0].sum(),
    "mask assignment": lambda y: y.detach().clone().__setitem__(y > 0, torch.ones_like(y[0, 0])),
    "index on the CPU": lambda y: y[torch.tensor([0, 1])],
    "blocking copy": lambda y: torch.zeros(3).to(y.device),
    "pageable copy": lambda y: torch.zeros(1 << 15).to(y.device, non_blocking=True),
    "tensor on the CPU": lambda y: y + torch.ones(4),
    "choice in half precision": lambda y: y.argmax(dim=1),
    "comparison in half precision": lambda y: y > 0.5,
    "collective on the CPU": lambda y: dist.all_reduce(torch.ones(2)),
    "half-precision collective": lambda y: dist.all_reduce(y.detach()),
    "device in the side group": lambda y: dist.all_reduce(y.detach(), group=SIDE),
}
OTHERS = ("none", "unused parameter")


def config(fault: str):
    path = Path(__file__).parents[2] / "configs/common/train.py"
    cfg = LazyConfig.load(str(path))
    cfg.model = L(Faulty)(fault=fault)
    cfg.optimizer = L(torch.optim.SGD)(params=L(pretrain_param_groups)(weight_decay=0.0), lr=0.1)
    complete_train(cfg)
    return cfg


def main() -> None:
    global SIDE
    out = Path(sys.argv[1])
    dist.init_process_group("gloo", f"file://{out}.meet", rank=0, world_size=1)
    SIDE = dist.new_group(backend="gloo")
    nothing = torch.zeros(2, 0)
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    view = View(images, nothing, nothing, nothing, nothing, nothing)
    batch = ViewBatch([view], torch.arange(2))
    device, group, found = install(), DeviceGroup(), {}
    for fault in (*OTHERS, *FAULTS):
        try:
            with Simulation(), group:
                found[fault] = train(config(fault), batch, device, 1, torch.bfloat16)
            found[fault]["collectives"] = group.calls()
        except RuntimeError as error:
            found[fault] = {"error": str(error)}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
