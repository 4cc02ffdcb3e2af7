"""Loss normalisers of one-stage detectors, and hooks of one class, in a resumed run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from detectron2.layers import ShapeSpec
from tiny_run import CLOCK, StopAt

from region_pretrain.config import load_config
from region_pretrain.engine.extra_state import (
    hook_states,
    load_hook_states,
    loss_normalizers,
    set_loss_normalizers,
)
from region_pretrain.engine.finetune import do_train
from region_pretrain.modeling.narrow_resnet import narrow_resnet18_stages

sys.path.insert(0, str(Path(__file__).parents[1] / "yacs"))
from zoo import SMALL, TRAINABLE  # noqa: E402  found by the line above


class Counter(HookBase):
    """Counts steps, and has a state of its own."""

    def __init__(self, start):
        self.count = start

    def after_step(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class NoState(HookBase):
    pass


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_a_one_stage_detector_continues_bit_for_bit(tmp_path, coco_folder, monkeypatch, name):
    """Its losses are divided by a running mean of positive anchors, which is no buffer."""
    data = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"

    def config(folder):
        overrides = [
            f"DATASETS.TRAIN=('{data}',)", f"DATASETS.TEST=('{data}',)", *SMALL, *TRAINABLE,
            "SOLVER.MAX_ITER=6", "SOLVER.BASE_LR=0.01",
        ]  # fmt: skip
        cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", overrides)
        if name == "fcos":
            cfg = load_config(
                "configs/detection/fcos_r50_fpn.py",
                [f"dataloader.train.dataset.names={data}", f"dataloader.test.dataset.names={data}"],
            )
            backbone, head = cfg.model.backbone, cfg.model.head
            backbone.bottom_up.stem.update(out_channels=8, norm="BN")
            backbone.bottom_up.stages = L(narrow_resnet18_stages)(channels=8, norm="BN")
            backbone.out_channels = 16
            backbone.top_block.update(in_channels=16, out_channels=16)
            head.update(conv_dims=[16], norm="", input_shape=[ShapeSpec(channels=16)] * 5)
            cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
            cfg.dataloader.train.mapper.augmentations = []
        cfg.dataloader.pop("evaluator")
        cfg.train.update(max_iter=6, device="cpu", seed=0, log_period=1, output_dir=str(folder))
        cfg.train.checkpointer.period = 2
        cfg.train.hooks = [L(StopAt)()]
        return cfg

    def losses(folder):
        lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
        return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]

    do_train(config(tmp_path / "whole"))
    monkeypatch.setenv("STOP_AT", "4")
    with pytest.raises(KeyboardInterrupt):
        do_train(config(tmp_path / "stopped"))
    monkeypatch.delenv("STOP_AT")
    do_train(config(tmp_path / "stopped"), resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    saved = torch.load(tmp_path / "whole/model_final.pth", weights_only=True)
    (of_rank,) = saved["loss_normalizers"]
    assert list(of_rank) == [""] and 1 < of_rank[""] < 1000


def test_processes_of_another_number_get_the_mean():
    class Own(torch.nn.Module):
        pass

    model = Own()
    assert loss_normalizers(model) == {}
    saved = [{"": 10.0}, {"": 30.0}]
    for rank, value in enumerate((10.0, 30.0)):
        set_loss_normalizers(model, saved, rank, 2)
        assert model.loss_normalizer == value
    set_loss_normalizers(model, saved, 0, 1)
    assert model.loss_normalizer == 20.0
    set_loss_normalizers(model, (), 0, 1)  # of an earlier version
    assert model.loss_normalizer == 20.0


def test_each_of_several_hooks_of_a_class_has_its_own_state(caplog):
    hooks = [Counter(1), NoState(), Counter(7)]
    states = hook_states(hooks)
    assert states == {"Counter": {"count": 1}, "Counter#2": {"count": 7}}
    again = [Counter(0), Counter(0)]
    load_hook_states(again, states)
    assert [hook.count for hook in again] == [1, 7]
    load_hook_states(again[:1], states)
    assert "there is no hook Counter#2 any more" in caplog.text
