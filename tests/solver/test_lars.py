import copy
import io

import pytest
import timm.optim
import torch
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.solver import LARS, pretrain_param_groups


def make_params(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5, 2, 3, 3), (6,), (2, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    with torch.no_grad():
        params[3].zero_()  # zero norm, so no adaptation
    return params


def set_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def slow_lars(params, velocity, lr, momentum, weight_decay, adapt, trust=0.001, eps=1e-8):
    """The update of :class:`LARS`, one parameter at a time, in float64."""
    for i, p in enumerate(params):
        w, g = p.detach().double(), p.grad.double()
        g = g + weight_decay * w
        w_norm, g_norm = w.square().sum().sqrt().item(), g.square().sum().sqrt().item()
        if adapt and w_norm > 0 and g_norm > 0:
            g = g * trust * w_norm / (g_norm + eps)
        velocity[i] = momentum * velocity[i] + g
        p.data = (w - lr * velocity[i]).float()


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_steps_match_a_slow_restatement(adapt, weight_decay):
    fast, slow = make_params(), make_params()
    optimizer = LARS(fast, lr=0.5, momentum=0.9, weight_decay=weight_decay, adapt=adapt)
    velocity = [torch.zeros_like(p, dtype=torch.float64) for p in slow]
    for step in range(4):
        set_grads(fast, step)
        set_grads(slow, step)
        grads = [p.grad.clone() for p in fast]
        optimizer.step()
        slow_lars(slow, velocity, 0.5, 0.9, weight_decay, adapt)
        for p, q, grad in zip(fast, slow, grads, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
            assert torch.equal(p.grad, grad)  # left as the backward pass made it


def test_equals_timm_without_weight_decay():
    ours, theirs = make_params(), make_params()
    mine = LARS(ours, lr=0.3, momentum=0.9)
    other = timm.optim.Lars(theirs, lr=0.3, momentum=0.9, trust_coeff=0.001, always_adapt=True)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        mine.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_denominator_is_the_norm_of_the_decayed_gradient():
    # ||w|| = 10 and ||g + wd w|| = 0.5 give the multiplier 0.001 * 10 / 0.5 = 0.02
    w = nn.Parameter(torch.tensor([[6.0, 8.0]]))
    w.grad = torch.tensor([[0.3, 0.4]]) - 0.01 * w.detach()
    LARS([w], lr=1.0, momentum=0.0, weight_decay=0.01).step()
    torch.testing.assert_close(
        w.detach(), torch.tensor([[6.0, 8.0]]) - 0.02 * torch.tensor([[0.3, 0.4]])
    )


def test_one_dimensional_parameters_take_a_plain_sgd_step():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model)
    optimizer = LARS(pretrain_param_groups(model, weight_decay=0.1), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.bias, before.bias - 0.5 * 1.0)
    g = 1.0 + 0.1 * before.weight
    expected = before.weight - 0.5 * g * 0.001 * before.weight.norm() / g.norm()
    torch.testing.assert_close(model.weight, expected)


def test_state_survives_a_weights_only_file():
    straight, resumed = make_params(), make_params()
    first, second = LARS(straight, lr=0.3), LARS(resumed, lr=0.3)
    for step in range(2):
        for params, optimizer in ((straight, first), (resumed, second)):
            set_grads(params, step)
            optimizer.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    second = LARS(resumed, lr=0.7)
    second.load_state_dict(torch.load(file, weights_only=True))
    for params, optimizer in ((straight, first), (resumed, second)):
        set_grads(params, 2)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))


def test_a_step_does_not_synchronise_with_the_device():
    # Tensors on "meta" have no values: a synchronisation raises.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to("meta")
    optimizer = LARS(pretrain_param_groups(model, weight_decay=1e-5), lr=1.0)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert len(optimizer.state) == 4


def test_a_negative_value_is_refused_by_name():
    with pytest.raises(UserError, match="optimizer.lr=-1: must not be negative"):
        LARS(make_params(), lr=-1)


def test_original_form_is_timms_with_weight_decay():
    ours, theirs = make_params(), make_params()
    mine = LARS(ours, lr=0.3, momentum=0.9, weight_decay=0.05, form="original")
    other = timm.optim.Lars(
        theirs, lr=0.3, momentum=0.9, weight_decay=0.05, trust_coeff=0.001, always_adapt=True
    )
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        mine.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_original_form_has_the_learning_rate_inside_the_momentum():
    w = nn.Parameter(torch.tensor([[6.0, 8.0]]))
    optimizer = LARS([w], lr=1.0, momentum=0.9, weight_decay=1e-5, form="original")
    slow, buffer = w.detach().clone().double(), torch.zeros(1, 2, dtype=torch.float64)
    for lr in (1.0, 0.5, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.tensor([[0.3, 0.4]])
        local = 0.001 * slow.norm() / (0.5 + 1e-5 * slow.norm())
        if lr == 1.0:
            assert local.item() == pytest.approx(0.019996, abs=1e-6)
        buffer = 0.9 * buffer + lr * local * (w.grad.double() + 1e-5 * slow)
        slow = slow - buffer
        optimizer.step()
        assert torch.equal(w.grad, torch.tensor([[0.3, 0.4]]))
        torch.testing.assert_close(w.detach().double(), slow, rtol=1e-6, atol=1e-7)


def test_original_form_without_adaptation_is_sgd():
    w = nn.Parameter(torch.tensor([6.0, 8.0]))
    w.grad = torch.tensor([0.3, 0.4])
    LARS([w], lr=0.5, momentum=0.0, adapt=False, form="original").step()
    torch.testing.assert_close(w.detach(), torch.tensor([6 - 0.15, 8 - 0.2]))
    with pytest.raises(UserError, match="optimizer.form=paper: must be decayed or original"):
        LARS([w], lr=0.5, form="paper")
