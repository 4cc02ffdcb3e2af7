import math
import re
import time

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from tiny_run import Batch, Loader, Poison, TinyMethod
from torch import nn

from region_pretrain.engine.hooks import CheckpointHook
from region_pretrain.engine.trainer import StepScalars, Trainer, split_batch
from region_pretrain.errors import NonFiniteLoss, UserError
from region_pretrain.modeling.meta_arch import PretrainingModel


class Regression(PretrainingModel):
    """Losses that are means over the batch, so that micro-batches can be checked by hand."""

    detector_modules = ("linear",)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.calls = []

    def forward(self, batch):
        self.calls.append(len(batch))
        y = self.linear(batch.x)
        get_event_storage().put_scalar("y_mean", y.mean())
        return {"loss_a": y.square().mean(), "loss_b": 2 * y.abs().mean(), "accuracy": y.max()}


class Recorder(HookBase):
    """What the storage holds after each step, by iteration."""

    def __init__(self):
        self.seen = {}

    def after_step(self):
        self.seen[self.trainer.iter] = {
            k: v for k, (v, i) in self.trainer.storage.latest().items() if i == self.trainer.iter
        }


def train(model, iterations=4, batch=8, optimizer=None, hooks=(), **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = Trainer(model, optimizer, Loader(batch).iterate, **{"log_period": 1, **options})
    recorder = Recorder()
    trainer.register_hooks([recorder, *hooks])
    trainer.train(0, iterations)
    return recorder.seen


def regression(seed=0):
    torch.manual_seed(seed)
    return Regression()


def test_steps_and_metrics_match_a_plain_loop():
    model, plain = regression(), regression()
    seen = train(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for t, batch in enumerate(Loader(8).iterate(0, 4)):
        y = batch.x @ plain.linear.weight.T + plain.linear.bias
        a, b = (y**2).mean(), 2 * y.abs().mean()
        optimizer.zero_grad()
        (a + b).backward()
        optimizer.step()
        assert seen[t]["total_loss"] == pytest.approx((a + b).item(), rel=1e-6)
        assert seen[t]["loss_a"] == pytest.approx(a.item(), rel=1e-6)
        assert seen[t]["loss_b"] == pytest.approx(b.item(), rel=1e-6)
        assert seen[t]["accuracy"] == pytest.approx(y.max().item(), rel=1e-6)  # reported only
        assert seen[t]["y_mean"] == pytest.approx(y.mean().item(), rel=1e-5)
    torch.testing.assert_close(model.linear.weight, plain.linear.weight)


@pytest.mark.parametrize("parts, sizes", [(2, [4, 4]), (3, [3, 3, 2]), (8, [1] * 8)])
def test_micro_batches_make_the_same_step_as_the_whole_batch(parts, sizes):
    whole, accumulated = regression(), regression()
    one = train(whole)
    many = train(accumulated, accumulate_steps=parts)
    assert accumulated.calls[:parts] == sizes
    torch.testing.assert_close(accumulated.linear.weight, whole.linear.weight)
    for t in one:
        assert many[t]["total_loss"] == pytest.approx(one[t]["total_loss"], rel=1e-5)


def test_lists_split_in_order_into_even_parts():
    assert split_batch(list("abcdefg"), 3) == [["a", "b"], ["c", "d"], ["e", "f", "g"]]
    assert split_batch(["a"], 1) == [["a"]]


def test_more_parts_than_images_is_refused():
    with pytest.raises(UserError, match="accumulate_steps=3.*only 2 images"):
        split_batch(["a", "b"], 3)


def test_gradients_are_clipped_by_norm():
    model, plain = regression(), regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = train(model, iterations=1, optimizer=optimizer, max_norm=0.1)
    y = plain.linear(next(Loader(8).iterate(0, 1)).x)
    (y.square().mean() + 2 * y.abs().mean()).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
    assert seen[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    moved = [
        (p - q).norm().item() for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    assert math.hypot(*moved) == pytest.approx(0.1, rel=1e-4)


def test_gradients_are_clipped_by_value():
    model, plain = regression(), regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train(model, iterations=1, optimizer=optimizer, max_value=0.05)
    y = plain.linear(next(Loader(8).iterate(0, 1)).x)
    (y.square().mean() + 2 * y.abs().mean()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q - q.grad.clamp(-0.05, 0.05))


def test_autocast_computes_in_bfloat16_and_steps_in_float32():
    model, plain = regression(), regression()
    kinds = []
    model.linear.register_forward_hook(lambda *args: kinds.append(args[2].dtype))
    seen = train(model, iterations=1, amp_dtype=torch.bfloat16)
    assert kinds == [torch.bfloat16]
    assert model.linear.weight.dtype == torch.float32
    exact = train(plain, iterations=1)
    assert seen[0]["total_loss"] == pytest.approx(exact[0]["total_loss"], rel=0.02)
    assert seen[0]["total_loss"] != exact[0]["total_loss"]


def test_step_hooks_of_the_model_run_once_per_step_with_micro_batches():
    calls = []

    class Recording(Regression):
        def before_step(self, iteration, max_iter):
            calls.append(("before", iteration, max_iter, len(self.calls)))

        def after_step(self, iteration, max_iter):
            calls.append(("after", iteration, max_iter, len(self.calls)))

    train(Recording(), iterations=2, accumulate_steps=2)
    assert calls == [
        ("before", 0, 2, 0),
        ("after", 0, 2, 2),
        ("before", 1, 2, 2),
        ("after", 1, 2, 4),
    ]


def test_a_metric_is_averaged_over_the_parts_where_it_is_defined():
    """The spread of one vector is not."""

    class Spread(Regression):
        def forward(self, batch):
            spread = batch.x.std(dim=0).mean()  # NaN of a single image
            return {**super().forward(batch), "embedding_std": spread, "none": spread * math.nan}

    torch.manual_seed(0)
    seen = train(Spread(), batch=3, accumulate_steps=2)  # of 1 and 2 images
    assert all(0 < row["embedding_std"] < 10 and "none" not in row for row in seen.values())
    seen = train(Spread(), batch=2, accumulate_steps=2)
    assert all("embedding_std" not in row and "loss_a" in row for row in seen.values())


def test_metrics_come_at_the_log_period_and_at_the_end():
    seen = train(regression(), iterations=8, log_period=3)
    assert [t for t in seen if "total_loss" in seen[t]] == [2, 5, 7]
    assert {"time", "data_time", "img_per_sec"} <= seen[2].keys()
    assert seen[2]["time"] >= seen[2]["data_time"] > 0


def test_throughput_counts_images_and_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(start, stop):
        for batch in Loader(8).iterate(start, stop):
            now[0] += 0.05
            yield batch

    def compute(*_):
        now[0] += 0.01

    recorder = Recorder()
    model = regression()
    model.register_forward_hook(compute)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), slow, log_period=4)
    trainer.register_hooks([recorder])
    trainer.train(0, 4)  # the first batch is loaded before the clock runs
    assert recorder.seen[3]["data_time"] == pytest.approx(3 * 0.05 / 4)
    assert recorder.seen[3]["time"] == pytest.approx(3 * 0.05 / 4 + 0.01)
    assert recorder.seen[3]["img_per_sec"] == pytest.approx(8 / recorder.seen[3]["time"], rel=1e-6)


def test_steps_between_log_periods_read_no_value_back_from_the_device():
    # Tensors on "meta" have no values: whatever would wait for the device raises.
    class Method(TinyMethod):
        def forward(self, batch):
            assert batch.x.device.type == "meta"
            p = self.predictor(self.backbone(batch.x))
            get_event_storage().put_scalar("online/embedding_std", p.std())
            return {"loss": (p - self.target["net"](batch.x).detach()).square().mean()}

    model = Method().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    batches = Loader(8).iterate
    trainer = Trainer(
        model, optimizer, batches, device="meta", accumulate_steps=2, max_norm=1.0, log_period=100
    )
    trainer.start_iter, trainer.max_iter = 0, 100
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(5):
            trainer.run_step()
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            trainer.check_finite()


def test_nan_names_iteration_losses_and_checkpoint():
    model = TinyMethod()
    with pytest.raises(FloatingPointError) as error:
        train(model, 9, log_period=4, hooks=[Poison(5)], last_checkpoint=lambda: "out/model_3.pth")
    message = str(error.value)
    assert "iteration 5" in message  # the first bad one, though it was looked at after 7
    assert "loss_main=nan" in message and "loss_l2=nan" in message
    assert "total_loss" not in message
    assert "last good checkpoint: out/model_3.pth" in message


def test_detectron2s_proposals_that_are_nan_end_in_the_same_way(monkeypatch):
    class Diverged(TinyMethod):
        def forward(self, batch):
            if diverges:
                raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
            return super().forward(batch)

    diverges = False
    train(Diverged(), 2)
    diverges = True
    with pytest.raises(NonFiniteLoss) as error:
        train(Diverged(), 2, last_checkpoint=lambda: "out/model_3.pth")
    assert re.match(
        r"training has diverged at iteration 0: Predicted boxes or scores contain Inf/NaN. last "
        "good checkpoint: out/model_3.pth. A lower optimizer.lr",
        str(error.value),
    )
    assert error.value.everywhere
    # Of several processes, others see it as well only if the weights, which they share, are NaN.
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for weight, everywhere in ((0.0, False), (math.nan, True)):
        model = Diverged()
        torch.nn.init.constant_(next(model.parameters()), weight)
        with pytest.raises(NonFiniteLoss) as error:
            train(model, 2)
        assert error.value.everywhere == everywhere


class NanStep(HookBase):
    """The update of the last step makes a weight NaN, after its loss was finite."""

    def after_step(self):
        if self.trainer.iter == 3:
            with torch.no_grad():
                next(self.trainer.model.parameters()).fill_(math.nan)


def test_weights_that_the_last_update_made_nan_are_not_saved():
    saved = []

    class Files:
        def restore_random_state(self):
            pass

        def save(self, name, iteration):
            saved.append(name)

        def remove_old(self, *_):
            pass

    hooks = [NanStep(), CheckpointHook(Files(), period=2, max_to_keep=None, keep_every=0)]
    with pytest.raises(FloatingPointError, match="weights became NaN or infinite at iteration 3"):
        train(TinyMethod(), 4, hooks=hooks)
    assert saved == ["model_0000001"]


def test_gradients_that_are_always_nan_stop_a_run_with_a_scaler_too():
    """It skips these steps, so that losses and weights stay finite."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, batch):
            return {"loss_a": (self.w * 0).abs().sqrt().sum()}

    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = Trainer(model, optimizer, Loader(8).iterate, log_period=1)
    trainer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(NonFiniteLoss, match="at iteration 2.: gradients of all recent steps=nan"):
        trainer.train(0, 40)
    assert model.w == 0


def test_infinite_sum_of_finite_losses_stops_too():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3e38))

        def forward(self, batch):
            return {"loss_a": self.w, "loss_b": self.w * 1.0}

    with pytest.raises(FloatingPointError, match="iteration 0: total_loss=inf; there is no check"):
        train(Huge(), 1)


def test_data_that_ends_early_is_an_error_of_the_user():
    model = regression()
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        lambda start, stop: iter([Batch(torch.zeros(2, 6))]),
    )
    with pytest.raises(UserError, match="ended before iteration 1 of 3"):
        trainer.train(0, 3)


def test_parameters_without_a_gradient_are_named_once(caplog):
    model = regression()
    model.unread = nn.Linear(2, 2)

    class Hold(HookBase):
        """Holds a layer fixed for some steps, as some methods do."""

        def after_backward(self):
            model.linear.bias.grad = None

    def said():
        caplog.clear()
        train(model, hooks=[Hold()])
        return [text for text in caplog.messages if "no gradient" in text]

    (message,) = said()
    text = "2 parameters got no gradient in the first step, e.g. unread.weight, unread.bias: if the"
    assert message.startswith(text)
    model.unread.requires_grad_(False)
    assert not said()


def test_a_model_without_a_loss_is_named():
    class Silent(Regression):
        def forward(self, batch):
            return {"accuracy": self.linear(batch.x).mean()}

    with pytest.raises(RuntimeError, match="no loss, only .'accuracy'"):
        train(Silent(), 1)


def test_step_scalars_keep_tensors_names_and_hints():
    with EventStorage(7) as storage:
        with StepScalars(storage) as scalars:
            with get_event_storage().name_scope("rpn"):
                get_event_storage().put_scalar("n", torch.tensor(2.0), smoothing_hint=False)
            get_event_storage().put_image("view", torch.zeros(3, 2, 2))
            assert get_event_storage().iter == 7
    assert scalars.values == {"rpn/n": [torch.tensor(2.0)]}
    assert scalars.hints == {"rpn/n": False}
    assert not storage.latest()
    assert [name for name, _, _ in storage._vis_data] == ["view"]


def test_nan_between_distant_log_steps_is_found_before_the_next_one(monkeypatch):
    monkeypatch.setattr("region_pretrain.engine.trainer._MAX_UNCHECKED", 3)
    seen = []

    class Count(HookBase):
        def after_step(self):
            seen.append(self.trainer.iter)

    with pytest.raises(NonFiniteLoss, match="at iteration 4"):
        train(TinyMethod(), 100, log_period=50, hooks=[Poison(4), Count()])
    assert len(seen) == 5  # iterations 3 to 5 are checked in step 5
