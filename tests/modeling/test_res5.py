"""The C4 head's last stage followed by a norm."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.backbone import BottleneckBlock, ResNet
from omegaconf import DictConfig
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.res5 import res5_stage_with_norm

STAGE = dict(
    block_class=BottleneckBlock,
    num_blocks=3,
    stride_per_block=[2, 1, 1],
    in_channels=16,
    bottleneck_channels=8,
    out_channels=32,
    norm="SyncBN",
    stride_in_1x1=False,
)


def test_is_the_stage_and_then_the_norm():
    torch.manual_seed(0)
    res5 = res5_stage_with_norm(**STAGE)
    nn.init.normal_(res5.norm.weight)
    nn.init.normal_(res5.norm.bias)
    stage = nn.Sequential(*ResNet.make_stage(**STAGE))
    norm = nn.BatchNorm2d(32)
    weights = res5.state_dict()
    stage.load_state_dict({k: v for k, v in weights.items() if not k.startswith("norm.")})
    norm.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith("norm.")})

    x = torch.randn(5, 16, 14, 14)
    expected = norm(stage(x))
    assert expected.shape == (5, 32, 7, 7)
    torch.testing.assert_close(res5(x), expected, rtol=0, atol=0)
    for module in (res5, stage, norm):
        module.eval()
    torch.testing.assert_close(res5(x), norm(stage(x)), rtol=0, atol=0)


def test_a_plain_res5_provides_all_weights_but_the_norms():
    stage = nn.Sequential(*ResNet.make_stage(**STAGE))
    result = res5_stage_with_norm(**STAGE).load_state_dict(stage.state_dict(), strict=False)
    entries = "weight", "bias", "running_mean", "running_var"
    assert result.missing_keys == [f"norm.{entry}" for entry in entries]
    assert result.unexpected_keys == []


def test_a_saved_config_builds_it(tmp_path):
    LazyConfig.save(
        DictConfig({"res5": L(res5_stage_with_norm)(**STAGE)}), str(tmp_path / "c.yaml")
    )
    res5 = instantiate(LazyConfig.load(str(tmp_path / "c.yaml")).res5)
    assert [name for name, _ in res5.named_children()] == ["0", "1", "2", "norm"]
    assert isinstance(res5.norm, nn.SyncBatchNorm)


@pytest.mark.parametrize("norm", ["", None])
def test_no_norm_is_an_error(norm):
    with pytest.raises(UserError, match="needs a norm"):
        res5_stage_with_norm(**{**STAGE, "norm": norm})
