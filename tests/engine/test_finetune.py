import json
import re

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from tiny_run import (
    CLOCK,
    FailingMean,
    MeanOutput,
    NoisyMapper,
    Poison,
    StopAt,
    TinyDetector,
    fine_tune_in_process,
    make_config,
    make_detection_config,
    records,
)

from region_pretrain.config import load_config
from region_pretrain.data.few_label import random_fraction
from region_pretrain.engine.command_line import argument_parser
from region_pretrain.engine.finetune import do_evaluate, do_test, do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import FailedElsewhere, launch
from region_pretrain.errors import UserError
from region_pretrain.images import UnreadableImage
from region_pretrain.metrics import DIVERGED, read_results


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    drop = CLOCK | {"bbox/AP-none"}  # NaN differs from itself
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def test_results_are_the_evaluators_and_on_disk(tmp_path):
    results = do_train(make_detection_config(tmp_path))
    model = TinyDetector().eval()
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["pretraining"] == {}  # a detector is all detector
    model.load_state_dict(state["model"])
    cfg = make_detection_config(tmp_path)
    assert results["bbox"]["AP"] == do_test(cfg, model)["bbox"]["AP"]
    x = torch.tensor([[i / 10, 1.0, 0.0] for i in range(5)])
    y = model.roi_heads(model.backbone(x)).mean().item()
    assert results["bbox"]["AP"] == pytest.approx(y, rel=1e-5)
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk == {"bbox": {"AP": results["bbox"]["AP"], "AP-none": None}}
    evaluated = [(m["iteration"], m["bbox/AP"]) for m in metrics(tmp_path) if "bbox/AP" in m]
    assert [t for t, _ in evaluated] == [2, 5, 8, 12]  # every 3 iterations, the last after the end
    assert evaluated[-1][1] == results["bbox"]["AP"]


@pytest.mark.parametrize("own_loader", [False, True])
def test_the_images_of_a_few_label_run_are_written_beside_it(tmp_path, own_loader):
    labelled = [{**r, "annotations": [{"iscrowd": 0, "category_id": 0}]} for r in records()]
    DatasetCatalog.register("few_of_tiny", lambda: labelled)
    cfg = make_detection_config(tmp_path)
    cfg.dataloader.train.dataset = L(random_fraction)(names="few_of_tiny", fraction=0.5, seed=1)
    if own_loader:
        cfg.dataloader.train.pin_memory = False  # unknown to DetectionTrainData
    try:
        do_train(cfg)
        expected = random_fraction("few_of_tiny", 0.5, seed=1)
    finally:
        DatasetCatalog.remove("few_of_tiny")
    content = json.loads((tmp_path / "labelled_images.json").read_text())
    assert len(expected) == 5
    assert content["image_ids"] == [d["image_id"] for d in expected]
    assert (content["datasets"], content["seed"]) == (["few_of_tiny"], 1)


def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch):
    # past an evaluation and a precise batch norm on either side of the checkpoint
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = do_train(make_detection_config(whole))
    monkeypatch.setenv("STOP_AT", "9")
    with pytest.raises(KeyboardInterrupt):
        do_train(make_detection_config(stopped, hooks=[L(StopAt)()]))
    monkeypatch.delenv("STOP_AT")
    results = do_train(make_detection_config(stopped, hooks=[L(StopAt)()]), resume=True)
    assert "Starting training from iteration 8" in (stopped / "log.txt").read_text()
    assert metrics(stopped) == metrics(whole)
    assert results["bbox"]["AP"] == expected["bbox"]["AP"]
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (whole, stopped))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_how_often_a_run_is_evaluated_does_not_change_it(tmp_path):
    """Precise batch norm runs the model, which draws random numbers."""
    found = []
    for period in (0, 2):
        folder = tmp_path / str(period)
        do_train(make_detection_config(folder, eval_period=period))
        found.append([row["total_loss"] for row in metrics(folder) if "total_loss" in row])
    assert len(found[0]) == 12 and found[0] == found[1]


def test_an_evaluation_that_is_written_is_not_repeated_on_resume(tmp_path, monkeypatch):
    train = {"checkpointer": {"period": 3}, "eval_period": 3, "log_period": 1, "max_iter": 8}
    monkeypatch.setenv("STOP_AT", "6")  # after the checkpoint and the evaluation of iteration 5
    with pytest.raises(KeyboardInterrupt):
        do_train(make_detection_config(tmp_path, hooks=[L(StopAt)()], **train))
    monkeypatch.delenv("STOP_AT")
    done = []

    def evaluate(self, original=MeanOutput.evaluate):
        done.append(get_event_storage().iter)
        return original(self)

    monkeypatch.setattr(MeanOutput, "evaluate", evaluate)
    do_train(make_detection_config(tmp_path, hooks=[L(StopAt)()], **train), resume=True)
    log = (tmp_path / "log.txt").read_text()
    assert "Starting training from iteration 6" in log and "is missing: evaluating" not in log
    assert len(done) == 1  # the final one


def final_weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_a_failed_evaluation_costs_nothing_but_itself(tmp_path, capsys):
    do_train(make_detection_config(tmp_path / "whole", checkpointer={"period": 3}))
    folder = tmp_path / "failed"
    cfg = make_detection_config(folder, checkpointer={"period": 3})
    working = cfg.dataloader.evaluator
    cfg.dataloader.evaluator = L(FailingMean)(process={2: 0}, evaluate={8: 0, 12: 0})
    with pytest.raises(
        UserError, match=r"the final evaluation failed: KeyError: 'area'\."
    ) as error:
        do_train(cfg)
    assert "\n" not in str(error.value) and not (folder / "results.json").exists()

    without = [{k: v for k, v in m.items() if "AP" not in k} for m in metrics(tmp_path / "whole")]
    failed = metrics(folder)
    assert [{k: v for k, v in m.items() if "AP" not in k} for m in failed] == without[:-1]
    assert [m["iteration"] for m in failed if "bbox/AP" in m] == [5]
    a, b = final_weights(folder), final_weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in b)

    log, console = (folder / "log.txt").read_text(), capsys.readouterr().out
    for iteration in (2, 8):
        text = f"the evaluation after iteration {iteration} failed: KeyError: 'area'. "
        text += f"The training continues; newest checkpoint: {folder}/model_000000{iteration}.pth"
        assert log.count(text) == console.count(text) == 1
    assert log.count("Traceback") == 3 and "Traceback" not in console

    # The command in the message repeats the evaluation.
    command = re.search(r"region-pretrain finetune (.+)$", str(error.value))[1].split()
    args = argument_parser("", "").parse_intermixed_args(command)
    assert args.eval_only
    again = load_config(args.config_file, args.opts)
    again.dataloader.evaluator = working
    whole = json.loads((tmp_path / "whole/results.json").read_text())
    assert do_evaluate(again)["bbox"]["AP"] == whole["bbox"]["AP"]


@pytest.mark.parametrize("at", [8, 11, 12])
@pytest.mark.parametrize("log_period", [1, 5])
def test_an_evaluation_that_was_killed_is_made_on_resume(tmp_path, monkeypatch, at, log_period):
    # 12 is the final evaluation, after model_final.pth
    train = {"checkpointer": {"period": 3}, "log_period": log_period, "max_iter": 14}
    train["eval_period"] = 12 if at == 11 else 3
    if at == 12:
        train["max_iter"] = 12
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = do_train(make_detection_config(whole, **train))

    def evaluate(self, original=MeanOutput.evaluate):
        if get_event_storage().iter == at:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MeanOutput, "evaluate", evaluate)
        do_train(make_detection_config(killed, **train))
    assert all(m["iteration"] < at for m in metrics(killed) if "bbox/AP" in m)
    name = "model_final" if at == 12 else f"model_{at:07d}"
    assert (killed / "last_checkpoint").read_text() == f"{name}.pth"

    results = do_train(make_detection_config(killed, **train), resume=True)
    assert results["bbox"]["AP"] == expected["bbox"]["AP"]
    assert metrics(killed) == metrics(whole)
    assert [m["iteration"] for m in metrics(whole) if "bbox/AP" in m][-1] == train["max_iter"]
    a, b = final_weights(killed), final_weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    resumed = (killed / "log.txt").read_text()
    assert (f"the evaluation after iteration {at} is missing" in resumed) == (at != 12)


def test_processes_agree_that_an_evaluation_failed(tmp_path):
    # rank 1 fails in the inference, the main process after it has gathered the outputs
    arguments = (str(tmp_path), {2: 1, 5: 0}, {8: 0})
    launch(fine_tune_in_process, 2, device="cpu", args=arguments)
    assert (tmp_path / "results.json").exists()
    log = (tmp_path / "log.txt").read_text()
    for iteration, where in ((2, "rank 1: "), (5, ""), (8, "")):
        assert f"the evaluation after iteration {iteration} failed: {where}KeyError: 'area'" in log
    assert [m["iteration"] for m in metrics(tmp_path) if "bbox/AP" in m] == [12]
    assert [m["iteration"] for m in metrics(tmp_path) if "loss_y" in m] == list(range(12))


def evaluate_without_a_file_on_second():
    cfg = make_detection_config("unused")
    cfg.dataloader.test.dataset = L(records)(count="many" if comm.get_rank() else 5)
    # A file of ground truth that one machine lacks fails like this.
    error = TypeError if comm.get_rank() else FailedElsewhere
    with pytest.raises(error, match="" if comm.get_rank() else "rank 1: "):
        do_test(cfg, TinyDetector())


def test_processes_agree_that_an_evaluation_could_not_start():
    launch(evaluate_without_a_file_on_second, 2, device="cpu")


def test_a_finished_run_is_only_evaluated(tmp_path):
    expected = do_train(make_detection_config(tmp_path))
    (tmp_path / "results.json").unlink()
    before = (tmp_path / "metrics.json").read_text()
    results = do_train(make_detection_config(tmp_path), resume=True)
    assert results["bbox"]["AP"] == expected["bbox"]["AP"]
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "metrics.json").read_text() == before


class Deterministic(TinyDetector):
    """Without batch statistics and random numbers."""

    def forward(self, batch):
        self.backbone[1].eval()
        goal = torch.stack([d["x"].sum() for d in batch])
        y = self.roi_heads(self.backbone(torch.stack([d["x"] for d in batch])))[:, 0]
        return {"loss_y": (y - goal).square().mean()} if self.training else [{"y": 0.0}] * len(y)


def test_micro_batches_of_lists(tmp_path):
    losses = {}
    for parts in (1, 2, 3):
        cfg = make_detection_config(tmp_path / str(parts), max_iter=3, accumulate_steps=parts)
        cfg.model = L(Deterministic)()
        do_train(cfg)
        losses[parts] = [m["loss_y"] for m in metrics(tmp_path / str(parts)) if "loss_y" in m]
    assert len(losses[1]) == 3
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[3] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["pre/model_final.pth", "pre", "pre?as=detectron2"])
def test_pretrained_weights_arrive(tmp_path, name):
    do_pretrain(make_config(tmp_path / "pre", max_iter=1))
    state = torch.load(tmp_path / "pre" / "model_final.pth", weights_only=True)["model"]

    cfg = make_detection_config(
        tmp_path / "fine",
        max_iter=1,
        init_checkpoint=str(tmp_path / name),
        precise_bn={"enabled": False, "num_iter": 0},
    )
    cfg.optimizer.lr = 0.0
    cfg.model = L(Matching)()
    do_train(cfg)
    fine = torch.load(tmp_path / "fine" / "model_final.pth", weights_only=True)["model"]
    for name, value in state.items():
        assert torch.equal(fine[name], value), name


class Matching(TinyDetector):
    """With the backbone of the tiny pre-training method."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Identity())
        self.roi_heads = torch.nn.Linear(5, 1)

    def forward(self, batch):
        return super().forward([{"x": torch.cat([d["x"], d["x"]])} for d in batch])


def test_a_failed_last_step_is_not_evaluated(tmp_path, monkeypatch):
    class Bias(Poison):
        def before_step(self):
            if self.trainer.iter == self.iteration:
                self.trainer.module.roi_heads.bias.data.fill_(np.nan)

    calls = []
    monkeypatch.setattr(MeanOutput, "reset", lambda self: calls.append(1))
    with pytest.raises(FloatingPointError, match="iteration 1: loss_y=nan"):
        do_train(make_detection_config(tmp_path, max_iter=2, hooks=[L(Bias)(iteration=1)]))
    assert calls == []
    assert not (tmp_path / "results.json").exists()
    cfg = make_detection_config(tmp_path / "trial", max_iter=2, hooks=[L(Bias)(iteration=1)])
    cfg.train.diverged_is_result = True
    assert do_train(cfg) == {DIVERGED: {}} == read_results(str(tmp_path / "trial"))
    assert calls == [] and "loss_y=nan" in (tmp_path / "trial/log.txt").read_text()


def test_evaluation_only(tmp_path):
    trained = do_train(make_detection_config(tmp_path / "run"))
    cfg = make_detection_config(
        tmp_path / "eval", init_checkpoint=str(tmp_path / "run" / "model_final.pth")
    )
    results = do_evaluate(cfg)
    assert results["bbox"]["AP"] == trained["bbox"]["AP"]
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["results_eval.json"]
    with pytest.raises(UserError, match="train.init_checkpoint"):
        do_evaluate(make_detection_config(tmp_path / "eval"))


def test_an_evaluation_whose_results_cannot_be_written_is_refused_before(tmp_path):
    cfg = make_detection_config(tmp_path / "run")
    do_train(cfg)
    (tmp_path / "file").touch()
    cfg.train.init_checkpoint = str(tmp_path / "run/model_final.pth")
    cfg.train.output_dir = str(tmp_path / "file/eval")
    cfg.dataloader.test = L(fail)()
    with pytest.raises(UserError, match=f"cannot write to train.output_dir {tmp_path}/file/eval"):
        do_evaluate(cfg)


def fail():
    raise AssertionError("it has evaluated")


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_keeps_the_mode_of_each_layer(tmp_path, fails):
    model = TinyDetector().train()
    model.backbone.eval()  # as in a training loop with frozen norms
    cfg = make_detection_config(tmp_path)
    if fails:
        model.forward = lambda inputs: fail()
        with pytest.raises(AssertionError):
            do_test(cfg, model)
    else:
        do_test(cfg, model)
    assert model.training and not model.backbone.training


class Batches:
    """A test loader of the user's own: iterable, with a length."""

    def __init__(self, loader):
        self._loader = loader

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        return iter(self._loader)


def test_a_test_loader_need_not_be_a_data_loader(tmp_path):
    cfg, model = make_detection_config(tmp_path), TinyDetector()
    expected = do_test(cfg, model)["bbox"]["AP"]
    cfg.dataloader.test = L(Batches)(loader=cfg.dataloader.test)
    assert do_test(cfg, model)["bbox"]["AP"] == expected


def test_without_an_evaluator_nothing_is_evaluated(tmp_path):
    cfg = make_detection_config(tmp_path, max_iter=1)
    del cfg.dataloader.evaluator
    assert do_train(cfg) == {}
    assert not (tmp_path / "results.json").exists()


def test_images_that_do_not_exist_are_found_before_training(tmp_path):
    cfg = make_detection_config(tmp_path / "run")
    cfg.dataloader.test.dataset = L(json.loads)(
        s=json.dumps([{"file_name": str(tmp_path / "gone.png"), "image_id": 1}])
    )
    with pytest.raises(UserError, match=r"dataloader.test: 1 of 1 image files.*gone\.png"):
        do_train(cfg)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(("fraction", "message"), [(0.5, None), (0.01, "2 of 10 training images")])
def test_the_tolerated_fraction_of_broken_images_is_a_setting(tmp_path, fraction, message):
    cfg = make_detection_config(tmp_path / "run", max_unreadable=fraction)
    cfg.dataloader.train.mapper = L(Breaking)()
    if message is None:
        do_train(cfg)
        assert "image 5 is broken; replaced by the next" in (tmp_path / "run/log.txt").read_text()
        return
    with pytest.raises(UserError, match=message):
        do_train(cfg)


class Breaking(NoisyMapper):
    """Fails for two of the images."""

    def __call__(self, record):
        if record["image_id"] in (5, 7):
            raise UnreadableImage(f"image {record['image_id']} is broken")
        return super().__call__(record)
