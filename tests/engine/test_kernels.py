"""Settings of cuDNN and of matrix products, during a run and after it."""

import pytest
import torch
from tiny_run import make_config

from region_pretrain.api.session import isolated
from region_pretrain.config import complete_train
from region_pretrain.engine.hooks import no_side_effects
from region_pretrain.engine.kernels import fast_kernels, use_fast_kernels
from region_pretrain.errors import UserError


def train_keys():
    return complete_train(make_config("unused")).train


def test_a_gpu_uses_tf32_and_cudnns_benchmark_as_configured(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    found = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    train = train_keys()
    assert (train.float32_matmul_precision, train.cudnn_benchmark) == ("high", False)
    train.cudnn_benchmark = True
    use_fast_kernels(train, torch.device("cpu"))
    assert found == [] and not torch.backends.cudnn.benchmark  # results on a CPU stay the same
    use_fast_kernels(train, torch.device("cuda", 0))
    assert found == ["high"] and torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError), no_side_effects(torch.nn.Linear(1, 1)):
        assert not torch.backends.cudnn.benchmark  # the images of an evaluation differ in shape
        raise RuntimeError
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), fast_kernels(train, torch.device("cuda", 0)):
        assert found == ["high"] * 2 and torch.backends.cudnn.benchmark
        raise RuntimeError
    assert found == ["high", "high", before] and not torch.backends.cudnn.benchmark
    train.float32_matmul_precision = "fast"
    with pytest.raises(UserError, match="precision=fast: must be one of highest, high, medium"):
        use_fast_kernels(train, torch.device("cpu"))


def test_a_programs_newer_precision_settings_are_kept():
    """Once they differ, PyTorch refuses to tell the older one."""
    places, train = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), train_keys()
    train.float32_matmul_precision = "highest"
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        torch.set_float32_matmul_precision("highest")
        places[0].fp32_precision = "tf32"
        before = [place.fp32_precision for place in places]
        try:
            with pytest.raises(RuntimeError):
                torch.get_float32_matmul_precision()
            with fast_kernels(train, device):
                inside = places[0].fp32_precision
            assert inside == ("ieee" if device.type == "cuda" else "tf32")
            assert [place.fp32_precision for place in places] == before
            with isolated():  # as the calls of the Python API
                torch.set_float32_matmul_precision("medium")
            assert [place.fp32_precision for place in places] == before
        finally:
            torch.set_float32_matmul_precision("highest")
