"""A step of several micro-batches against one forward pass for each, from the same state."""

import copy

import pytest
import torch
from detectron2.engine import HookBase

from region_pretrain.engine.trainer import Trainer

MOMENTUM, LR = 0.7, 0.2


class Gradients(HookBase):
    def __init__(self, model):
        self.model, self.steps = model, []

    def after_step(self):
        self.steps.append({n: p.grad for n, p in self.model.named_parameters()})


def teacher_similarities(model, key, batch):
    """The key network's similarities to its prototypes at the places of the partner."""
    view = batch.views[2]
    with torch.no_grad():
        maps = model._embed(key, view)
        weights = model._weights(view.boxes[..., :2], view, maps.size)
        vectors = (weights @ maps.affinity)[view.valid]
        return vectors @ key["affinity_head"].directions().T


def slow_step(model, batches, iteration, max_iter, total):
    """The gradients of a step; moves key network, center and queue of ``model``."""
    gradients, rows = {}, []
    state, queue = copy.deepcopy(model), model.queue.state_dict()
    for batch in batches:
        fresh = copy.deepcopy(state)  # so each micro-batch is the first of its step
        fresh.queue.load_state_dict(queue)  # with the keys of those before it
        fresh.before_step(iteration, max_iter)
        outputs = fresh(batch)
        loss = sum(value for name, value in outputs.items() if name.startswith("loss"))
        (loss * len(batch) / total).backward()
        for name, p in fresh.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad
        queue = fresh.queue.state_dict()
        rows.append(teacher_similarities(fresh, copy.deepcopy(state).key, batch))
    model.queue.load_state_dict(queue)
    model.distillation.center.lerp_(torch.cat(rows).mean(dim=0), 0.1)
    model.key.ema_update(MOMENTUM)
    return gradients


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_of_several_micro_batches(small_model, make_batch, parts):
    model = small_model(prototypes=4, fpn="p4", momentum=lambda progress: MOMENTUM)
    with torch.no_grad():
        for p in model.key.parameters():
            p.mul_(1.2)
    batches = [make_batch(4), make_batch(5)]
    batches[0].views[2].valid[0, 3:] = False  # micro-batches with different numbers of places
    slow = copy.deepcopy(model)
    recorder = Gradients(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    trainer = Trainer(model, optimizer, lambda *_: iter(batches), accumulate_steps=parts)
    trainer.register_hooks([recorder])
    trainer.train(0, 2)

    slow.train()
    for iteration, batch in enumerate(batches):
        gradients = slow_step(slow, batch.chunk(parts), iteration, 2, len(batch))
        for name, found in recorder.steps[iteration].items():
            if found is not None:
                norm = gradients[name].norm()
                assert (found - gradients[name]).norm() <= 2e-3 * norm + 1e-6, name
        with torch.no_grad():
            for name, p in slow.named_parameters():
                if name in gradients:
                    p.sub_(LR * gradients[name])
    for name, value in slow.state_dict().items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    kept = model._before_update  # a step of one micro-batch needs no second key network
    assert bool(kept) == (parts > 1)
