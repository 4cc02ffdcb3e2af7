"""Running statistics that are computed anew before an evaluation."""

import torch
from detectron2.config import LazyCall as L
from tiny_run import NoisyMapper, TinyDetector, make_detection_config, records

from region_pretrain.engine.detection_data import DetectionTrainData
from region_pretrain.engine.finetune import do_train


def test_precise_batch_norm_sees_the_next_batches(tmp_path):
    cfg = make_detection_config(tmp_path, max_iter=3, eval_period=0)
    do_train(cfg)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    batches = DetectionTrainData(records(), NoisyMapper(), 4, seed=0).iterate(3, 5)
    x = [torch.stack([d["x"] for d in batch]) for batch in batches]
    assert len(x) == 2
    y = torch.cat(x) @ state["backbone.0.weight"].T + state["backbone.0.bias"]
    torch.testing.assert_close(state["backbone.1.running_mean"], y.mean(0))
    torch.testing.assert_close(state["backbone.1.running_var"], y.var(0, unbiased=False))


class WithoutRegions(TinyDetector):
    """Its second norm sees no row in the second precise batch, as a mask head without an object."""

    def __init__(self):
        super().__init__()
        self.mask_head, self.calls = torch.nn.BatchNorm1d(3), 0
        self.unused = torch.nn.BatchNorm1d(3)

    def forward(self, batch):
        x = torch.stack([d["x"] for d in batch])
        if not torch.is_grad_enabled():
            self.calls += 1
            for norm, empty in ((self.mask_head, self.calls == 2), (self.unused, True)):
                # As SyncBN: batch norms of one process refuse an empty batch.
                norm(x) if not empty else [hook(norm, (x[:0],)) for hook in hooks_of(norm)]
        return super().forward(batch)


def hooks_of(module):
    return module._forward_pre_hooks.values()


def test_precise_batch_norm_of_a_head_without_regions(tmp_path):
    cfg = make_detection_config(tmp_path, max_iter=3, eval_period=0)
    cfg.model = L(WithoutRegions)()
    do_train(cfg)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    first, _ = DetectionTrainData(records(), NoisyMapper(), 4, seed=0).iterate(3, 5)
    x = torch.stack([d["x"] for d in first])
    torch.testing.assert_close(state["mask_head.running_mean"], x.mean(0))
    torch.testing.assert_close(state["mask_head.running_var"], x.var(0, unbiased=False))
    assert (state["unused.running_mean"] == 0).all() and (state["unused.running_var"] == 1).all()
