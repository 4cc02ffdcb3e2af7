"""The detection configs in Detectron2's own ``tools/lazyconfig_train_net.py``.

The script is not installed with Detectron2; :func:`train_as_detectron2_does` restates it.
"""

import argparse
import inspect
import json

import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset
from fvcore.common.param_scheduler import ParamScheduler
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.config import CONFIG_ROOT

DETECTION = sorted((CONFIG_ROOT / "detection").glob("*.py"))


def train_as_detectron2_does(config_file, overrides):
    """Train and evaluate with nothing of this project but the config; returns the results."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(config_file)), overrides)
    default_setup(cfg, argparse.Namespace(eval_only=False))
    train = cfg.train

    model = instantiate(cfg.model)
    model.to(train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    model = create_ddp_model(model, **train.ddp)
    trainer_class = AMPTrainer if train.amp.enabled else SimpleTrainer
    trainer = trainer_class(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(
        model, train.output_dir, optimizer=optimizer, trainer=trainer
    )
    results = []

    def evaluate():
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        results.append(inference_on_dataset(model, loader, evaluator))
        return results[-1]

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer),
            hooks.EvalHook(train.eval_period, evaluate),
            hooks.PeriodicWriter(
                default_writers(train.output_dir, train.max_iter), period=train.log_period
            ),
        ]
    )
    checkpointer.resume_or_load(train.init_checkpoint, resume=False)
    trainer.train(0, train.max_iter)
    return results[-1]


def test_the_shapes_config_trains_and_is_evaluated(tmp_path):
    results = train_as_detectron2_does(
        CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py",
        [
            "train.device=cpu",
            f"train.output_dir={tmp_path}",
            "train.max_iter=2",
            "train.log_period=1",
            "train.checkpointer.period=1",
            "dataloader.train.dataset.names.size=8",
            "dataloader.test.dataset.names.size=4",
            "dataloader.train.total_batch_size=2",
            "dataloader.train.num_workers=0",
            "model.roi_heads.box_predictor.test_score_thresh=0.0",
        ],
    )
    assert 0 <= results["bbox"]["AP"] <= 100 and 0 <= results["segm"]["AP"] <= 100
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "model_0000000.pth", "model_0000001.pth", "model_final.pth"} <= names
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1]
    assert lines[0]["lr"] == pytest.approx(0.001)  # warm-up from 1 % of 0.1


@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_every_key_that_the_script_reads_has_a_value_that_it_accepts(path):
    cfg = LazyConfig.load(str(path))
    train = cfg.train
    inspect.signature(hooks.PeriodicCheckpointer).bind(None, **train.checkpointer)
    assert train.checkpointer.period > 0 and train.checkpointer.max_to_keep > 0
    # create_ddp_model's own argument, and those that it passes on
    options = {"fp16_compression", *inspect.signature(DistributedDataParallel).parameters}
    assert set(train.ddp) <= options
    # null would leave the model on the CPU even if there is a GPU
    assert train.device == "cuda"
    assert isinstance(train.amp.enabled, bool)
    for key in ("max_iter", "eval_period", "log_period", "seed"):
        assert isinstance(train[key], int) and train[key] >= (key != "seed"), key
    for key in ("output_dir", "init_checkpoint"):
        assert isinstance(train[key], str), key
    # The script neither scales the learning rate nor accumulates or clips gradients.
    assert train.base_batch_size in (None, cfg.dataloader.train.total_batch_size)
    assert train.accumulate_steps == 1 and not train.clip_grad.enabled
    assert isinstance(instantiate(cfg.lr_multiplier), ParamScheduler)
    assert {"test", "evaluator"} <= cfg.dataloader.keys()
    assert "model" not in cfg.optimizer.params
