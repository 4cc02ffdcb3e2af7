"""Training on a GPU: losses of the CPU, no waits, exact resume, compiled trunks."""

import json
from itertools import repeat
from pathlib import Path

import pytest
import torch
from steps import load, train
from torch import nn

from region_pretrain.benchmark.gpu_report import host_waits
from region_pretrain.benchmark.images import make_jpegs
from region_pretrain.benchmark.measure import make_trainer, use_images
from region_pretrain.benchmark.step import repeated_steps
from region_pretrain.config import load_config
from region_pretrain.engine.pretrain import do_pretrain

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
#: dtype of autocast -> relative and absolute tolerance of a first loss.
TOLERANCES = {
    None: (1e-4, 1e-5),
    torch.bfloat16: (0.03, 0.1),  # as on the simulated device
    torch.float16: (0.01, 0.03),
}


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """The GPU in float32 without TF32, and without algorithms that change from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("images"))
    make_jpegs(folder, 4, (128, 96))
    return folder


@pytest.fixture
def same_random_numbers(monkeypatch) -> None:
    """Models draw from the CPU's generator on both devices, and drop nothing."""

    def rand_like(t: torch.Tensor) -> torch.Tensor:
        return torch.rand(t.shape, dtype=t.dtype).to(t.device)

    monkeypatch.setattr(torch, "rand_like", rand_like)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "bf16", "fp16"])
def test_losses_are_those_of_the_cpu(config, dtype, gpu, images, same_random_numbers):
    cfg, batch = load(config, images)
    steps = 2 if dtype is None else 1
    on_cpu = train(cfg, batch, CPU, steps)
    on_gpu = train(cfg, batch, gpu, steps, dtype)
    rel, abs_ = TOLERANCES[dtype]
    assert on_gpu["losses"][0] == pytest.approx(on_cpu["losses"][0], rel=rel, abs=abs_)
    if dtype is None:  # after one step of the optimiser
        assert on_gpu["losses"][1] != on_gpu["losses"][0]
        # On the CPU alone, weights that differ by 1e-6 change CCOP's second losses by 5 %.
        assert on_gpu["losses"][1] == pytest.approx(on_cpu["losses"][1], rel=0.1)
    assert on_gpu["without_gradient"] == []


@pytest.mark.parametrize("amp", ["float32", "bfloat16"])
def test_a_step_waits_for_nothing(config, amp, gpu, images):
    cfg, batch = load(config, images)
    if amp != "float32":
        cfg.train.amp.enabled, cfg.train.amp.dtype = True, amp
    trainer = make_trainer(cfg, gpu)
    with repeated_steps(trainer, lambda start, stop: repeat(batch.pin_memory())) as step:
        step()
        step()
        assert host_waits(step) == {}
        found = host_waits(lambda: torch.ones(1, device=gpu).item())
    assert sum(found.values()) == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """Images that are written once: a resumed run refuses files that have changed."""
    return make_jpegs(str(tmp_path_factory.mktemp("files")), 4, (128, 96))


def run(config: str, files: tuple[str, str], output: Path, **train):
    """A run of five iterations that saves after every second one."""
    cfg = load_config(config, [])
    use_images(cfg, *files)
    cfg.dataloader.train.update(total_batch_size=4, num_workers=0)
    cfg.train.update(
        output_dir=str(output),
        device="cuda",
        max_iter=5,
        log_period=1,
        checkpointer={"period": 2, "max_to_keep": 2},
        hooks=[{"_target_": "tiny_run.StopAt"}],
        float32_matmul_precision="highest",
        cudnn_benchmark=False,
        **train,
    )
    return cfg


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k or k == "iteration"} for line in lines]


@pytest.mark.parametrize("amp", ["float32", "float16"])
def test_a_resumed_run_continues(unlabelled_config, amp, gpu, files, tmp_path, monkeypatch):
    """The first resumed loss depends on everything in a checkpoint, and is equal bit for bit.

    The gradients of pooled regions and of indexed rows are sums of atomic additions, whose order
    changes from run to run, so the loss after the next update may differ in its last digits.
    """
    train = {"amp": {"enabled": amp != "float32", "dtype": "float16"}}
    monkeypatch.setenv("STOP_AT", "4")
    with pytest.raises(KeyboardInterrupt):
        do_pretrain(run(unlabelled_config, files, tmp_path, **train))
    before = losses(tmp_path)
    assert [line["iteration"] for line in before] == [0, 1, 2, 3]
    monkeypatch.delenv("STOP_AT")
    (tmp_path / "model_0000003.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")

    do_pretrain(run(unlabelled_config, files, tmp_path, **train), resume=True)
    after = losses(tmp_path)
    assert [line["iteration"] for line in after] == [0, 1, 2, 3, 4]
    assert after[:3] == before[:3]
    assert after[3] == pytest.approx(before[3], rel=1e-4 if amp == "float32" else 1e-2)


def test_a_compiled_model_has_the_same_losses(compiled_config, gpu, images):
    found = []
    for compiled in (False, True):
        cfg, batch = load(compiled_config, images)
        cfg.train.update(float32_matmul_precision="highest", compile=compiled)
        trainer = make_trainer(cfg, gpu)
        with repeated_steps(trainer, lambda start, stop, batch=batch: repeat(batch)):
            trainer.run_step()
            found.append(trainer._unchecked[-1][2].tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)
