"""The small detector built by stock Detectron2, in a process that cannot import this project."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

_SCRIPT = """
    import json
    import sys
    sys.modules["region_pretrain"] = None  # importing it fails
    import torch
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyCall as L, instantiate
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

    cfg = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    cfg.backbone.bottom_up.stem.update(out_channels=24, norm="BN")
    cfg.backbone.bottom_up.stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock, num_blocks=2, stride_per_block=[stride, 1],
            in_channels=inputs, out_channels=outputs, norm="BN",
        )
        for inputs, outputs, stride in ((24, 24, 1), (24, 48, 2), (48, 96, 2), (96, 192, 2))
    ]
    cfg.backbone.norm = "BN"
    cfg.backbone.out_channels = cfg.proposal_generator.head.in_channels = 48
    heads = cfg.roi_heads
    heads.box_head.input_shape = ShapeSpec(channels=48, height=7, width=7)
    heads.box_head.update(conv_dims=[48] * 4, conv_norm="BN", fc_dims=[256])
    heads.box_predictor.input_shape = ShapeSpec(channels=256)
    heads.mask_head.input_shape = ShapeSpec(channels=48, height=14, width=14)
    detector = instantiate(cfg)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    checkpointer = DetectionCheckpointer(detector)
    incompatible = []
    checkpointer._log_incompatible_keys = incompatible.append
    missing = []
    for path in sys.argv[1:]:
        checkpointer.load(path)
        saved = torch.load(path, weights_only=True)["model"]
        for name, value in detector.state_dict().items():
            assert torch.equal(value, saved[name] if name in saved else before[name]), name
        keys = incompatible.pop()
        assert not incompatible and not keys.unexpected_keys and not keys.incorrect_shapes, keys
        missing.append(sorted(keys.missing_keys))
        detector.load_state_dict(before)
    print(json.dumps(missing))
"""


def load_into_stock_detectron2(*paths: Path) -> list[list[str]]:
    """Load checkpoints into the small detector, one by one.

    All tensors must arrive unchanged, and all others must keep their initial values.

    Returns:
        For each checkpoint the names that it does not fill.
    """
    command = [sys.executable, "-c", textwrap.dedent(_SCRIPT), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
