"""A detector's boxes as regions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.config import to_yaml
from region_pretrain.convert.reading import checkpoint_of
from region_pretrain.engine.build import build_model, resolve_device
from region_pretrain.engine.image_boxes import ImageBoxes, load_model_config
from region_pretrain.engine.transfer import TransferReport, load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.files import sha256_of
from region_pretrain.images import EncodedImage, SamePixels
from region_pretrain.regions.elsewhere.matching import Given


class DetectorBoxes(ImageBoxes):
    """Runs a detector over the images of records, in batches.

    Args:
        config: a detection config: LazyConfig, ``config.yaml`` of a run, or Detectron2's yaml.
        weights: its checkpoint.
        detections: use the final detections; otherwise the proposals of the first stage, if the
            detector has one.
        batch_size: images per batch.
        device: ``cuda``, ``mps`` or ``cpu``; None: the config's.

    Attributes:
        detections: whether the boxes are final detections.
        digest: 16 hexadecimal digits that identify the model, its test-time augmentation and its
            weights.

    Raises:
        UserError: the config or the weights cannot be loaded, or do not belong together.
    """

    def __init__(
        self,
        config: str,
        weights: str,
        detections: bool = False,
        batch_size: int = 8,
        device: str | None = None,
    ) -> None:
        super().__init__(batch_size)
        cfg = load_model_config(config)
        mapper = cfg.get("dataloader", {}).get("test", {}).get("mapper")
        if mapper is None:
            raise UserError(f"{config} has no dataloader.test.mapper: it is not a detection config")
        device = resolve_device(device or cfg.train.device)
        self._model = build_model(cfg, device).eval()
        two_stage = getattr(self._model, "proposal_generator", None) is not None
        self.detections = detections or not two_stage
        report = load_pretrained(self._model, weights)
        _check_trained(report, weights, self.detections)
        self._mapper = SamePixels(instantiate(mapper))
        self._source = weights
        self.digest = _digest({"model": cfg.model, "mapper": mapper}, weights)

    def read(self, record: dict) -> dict:
        image = EncodedImage.read(record["file_name"], record.get("crop"), record.get("reading"))
        width, height = image.size()
        record_of_image = {k: v for k, v in record.items() if k != "annotations"}
        return self._mapper({**record_of_image, "width": width, "height": height})

    def find(self, inputs: Sequence[Mapping[str, Any]]) -> list[Given]:
        if self.detections:
            outputs = self._model(inputs)
            if "instances" not in outputs[0]:
                raise UserError(f"{type(self._model).__name__} detects no boxes")
            results = [output["instances"] for output in outputs]
        else:
            results = _proposals(self._model, inputs)
        return [self._given(result) for result in results]

    def _given(self, result: Instances) -> Given:
        height, width = result.image_size
        boxes, scores = (
            (result.pred_boxes, result.scores)
            if self.detections
            else (result.proposal_boxes, result.objectness_logits.sigmoid())
        )
        boxes, scores = (x.float().cpu().numpy() for x in (boxes.tensor, scores))
        return Given(boxes, scores, (width, height), self._source)


def _proposals(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> list[Instances]:
    """The first stage's proposals, in pixels of the original images."""
    images = model.preprocess_image(inputs)
    proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
    return [
        detector_postprocess(result, given["height"], given["width"])
        for result, given in zip(proposals, inputs, strict=True)
    ]


def _check_trained(report: TransferReport, weights: str, detections: bool) -> None:
    """Refuse weights that leave parts of the detector random whose output is used."""
    random = [n for n in report.incomplete if detections or not n.startswith("roi_heads")]
    if random:
        raise UserError(
            f"{weights} has no weights for {', '.join(random)}: it is not a trained detector of "
            "this config"
        )


def _digest(parts: Mapping[str, Any], weights: str) -> str:
    resolved = {  # they may refer to keys beside them
        name: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        for name, part in parts.items()
    }
    cfg = OmegaConf.create(resolved, flags={"allow_objects": True})
    path = checkpoint_of(os.path.expanduser(weights.partition("?")[0]))
    digests = to_yaml(cfg) + sha256_of(PathManager.get_local_path(path))
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
