"""Supervised MCL: tiles are classified into their image's class."""

import math

import pytest
import torch
import torch.nn.functional as F

from region_pretrain.errors import UserError

NAMES = ["p5", "p4", "p3", "p2"]


def test_losses_against_a_slow_restatement(small_mcl, make_batch):
    model = small_mcl(supervised=True).eval()
    batch = make_batch(5, seed=1)
    batch.labels = torch.tensor([3, 0, 4, 4, 1])
    torch.manual_seed(7)
    slots = [model.montage.draw(5), model.montage.draw(5)]
    torch.manual_seed(7)
    with torch.no_grad():
        outputs = model(batch)
        torch.manual_seed(7)
        pyramids = model.pyramids(batch)
        for i, (name, weight) in enumerate(zip(NAMES, (1 / 2, 1 / 4, 1 / 8, 1 / 8), strict=True)):
            terms, hits = [[], []], [[], []]
            for p, canvases in enumerate(pyramids):
                logits = model.tile_vectors(model.trunk, canvases, [i], model.classifier)[i]
                for slot, image in enumerate(slots[p][i].tolist()):
                    truth = batch.labels[image]
                    terms[p].append(-F.log_softmax(logits[slot], 0)[truth].item())
                    hits[p].append(logits[slot].argmax().item() == truth)
            means = [sum(t) / len(t) for t in terms]
            assert outputs[f"loss_{name}"].item() == pytest.approx(
                weight * sum(means) / 2, abs=1e-5
            )
            rates = [sum(h) / len(h) for h in hits]
            assert outputs[f"accuracy_{name}"].item() == pytest.approx(sum(rates) / 2)


def test_loss_of_a_zero_classifier(small_mcl, make_batch):
    model = small_mcl(supervised=True)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    outputs = model(make_batch(4))
    losses = [outputs[f"loss_{name}"].item() for name in NAMES]
    assert sum(losses) == pytest.approx(math.log(5), abs=1e-5)


def test_it_learns_classes_at_every_level(small_mcl, make_batch):
    """Five images, identical in all views: a few steps suffice."""
    model = small_mcl(supervised=True, level_weights=[1, 1, 1, 1]).train()
    batch = make_batch(5)
    for view in batch.views:
        view.images = batch.views[0].images
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        outputs = model(batch)
        sum(v for k, v in outputs.items() if k.startswith("loss")).backward()
        optimizer.step()
    assert all(outputs[f"accuracy_{name}"] > 0.9 for name in NAMES)
    assert all(p.grad is not None for p in model.parameters())


def test_invalid_labels_are_reported(small_mcl, make_batch):
    model, batch = small_mcl(supervised=True), make_batch(4)
    batch.labels = torch.tensor([0, 5, 1, 1])
    with pytest.raises(UserError, match="class 5 .* model.classifier.out_features=5"):
        model(batch)
    batch.labels = None
    with pytest.raises(UserError, match="dataloader.train.dataset.labels=True"):
        model(batch)
    with pytest.raises(UserError, match="level_weights"):
        small_mcl(supervised=True, level_weights=[1.0])
