"""Heads, pyramids, pooling and local norms."""

import torch
from detectron2.config import instantiate
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.norms import use_local_batchnorm
from region_pretrain.modeling.pyramid import pyramid_maps, trunk_and_pyramid_features
from region_pretrain.modeling.regions import pool_boxes, pool_regions


def test_dropout_precedes_the_nonlinearity_and_init_std_sets_the_weights():
    torch.manual_seed(0)
    head = MLPHead(300, 400, 200, norm="", dropout=0.25, init_std=0.01)
    assert [type(m) for m in head] == [nn.Linear, nn.Dropout, nn.ReLU, nn.Linear]
    for linear in (head[0], head[3]):
        assert abs(linear.weight.std().item() - 0.01) < 2e-4 and linear.bias.abs().max() == 0
    hidden = head.train()[1](torch.ones(1000, 400))
    assert abs((hidden == 0).float().mean().item() - 0.25) < 0.01
    assert [type(m) for m in MLPHead(3, 4, 2, norm="")] == [nn.Linear, nn.ReLU, nn.Linear]


def test_trunk_and_pyramid_are_the_detectors_own():
    torch.manual_seed(0)
    fpn = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.backbone).eval()
    with torch.no_grad():
        for side in (64, 56):  # the second does not divide by 32
            images = torch.randn(2, 3, side, side)
            trunk, maps = trunk_and_pyramid_features(fpn, images)
            assert list(maps) == ["p2", "p3", "p4", "p5"]
            expected = pyramid_maps(fpn, images, dict.fromkeys(maps, slice(0, 2)))
            own = fpn(images) if side == 64 else expected
            for name, value in maps.items():
                torch.testing.assert_close(value, own[name])
                torch.testing.assert_close(value, expected[name])
            for name, value in fpn.bottom_up(images).items():
                torch.testing.assert_close(trunk[name], value)


def test_boxes_in_any_order_are_pooled_like_slots():
    torch.manual_seed(0)
    pooler = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.roi_heads)
    pooler = pooler.box_pooler
    maps = [torch.randn(2, 4, side, side) for side in (32, 16, 8, 4)]
    boxes = torch.rand(2, 5, 2, 2).sort(dim=2).values.flatten(2) * 128
    levels = torch.randint(0, 4, (2, 5))
    slots = pool_regions(maps, boxes, levels, pooler, (128, 128)).view(2, 5, 4, 7, 7)
    image, slot = torch.tensor([1, 0, 1, 1]), torch.tensor([3, 2, 0, 3])
    found = pool_boxes(maps, boxes[image, slot], image, levels[image, slot], pooler, (128, 128))
    torch.testing.assert_close(found, slots[image, slot])
    none = pool_boxes(maps, boxes[0, :0], image[:0], levels[0, :0], pooler, (128, 128))
    assert none.shape == (0, 4, 7, 7)


def test_local_norms_keep_the_same_tensors():
    norm = nn.SyncBatchNorm(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Sequential(norm)).eval()
    names = list(model.state_dict())
    assert use_local_batchnorm(model) is model and list(model.state_dict()) == names
    assert type(model[1]) is nn.BatchNorm2d and model[2][0] is model[1]
    assert model[1].weight is norm.weight and model[1].running_mean is norm.running_mean
    assert not model[1].training
    naive = nn.Sequential(NaiveSyncBatchNorm(4))
    assert type(use_local_batchnorm(naive)[0]) is nn.BatchNorm2d
