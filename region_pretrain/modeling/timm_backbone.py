"""Networks of timm as backbones of Detectron2 detectors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from detectron2.modeling.backbone import Backbone
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from region_pretrain.errors import UserError, did_you_mean

#: Options with which timm's transformers accept images of any size; the first that fit are used.
#: ``always_partition`` shifts the windows of a Swin's last stage too, as Detectron2's Swin does.
_ANY_SIZE: tuple[dict[str, bool], ...] = (
    {"strict_img_size": False, "always_partition": True},
    {"dynamic_img_size": True},
    {},
)
_NORMS = ("BN", "SyncBN", "FrozenBN")
_REQUIRED = ("forward_intermediates", "prune_intermediate_layers")


class TimmBackbone(Backbone):
    """The feature maps of a timm model.

    It is the ``bottom_up`` of Detectron2's FPN, or the ``net`` of its SimpleFeaturePyramid for a
    plain ViT. Maps are named after their stride: ``res2`` has stride 4, ``res5`` stride 32. Of
    several maps with the same stride, such as the blocks of a ViT, only the last one is available.
    Maps are not normalised by the model's final norm, which is removed like its classifier.

    The model is the submodule ``timm``, so parameters have timm's names after ``timm.``.

    Args:
        name: name of the model in timm. Its weights come from ``train.init_checkpoint``; a tag such
            as ``.fb_in1k`` is ignored.
        out_features: names of the maps to return; by default those with stride 4 or more. Layers
            after the coarsest one are removed.
        norm: ``"BN"`` (timm's default), ``"SyncBN"`` or ``"FrozenBN"`` for the batch norms; no
            effect on other norms.
        **options: arguments of the model, e.g. ``drop_path_rate`` or ``img_size``.

    Attributes:
        arguments: ``name`` and ``options``, to build the same model with ``timm.create_model``.

    Raises:
        UserError: timm is not installed, or has no such model; the model has no maps of these
            names, or none whose stride is a power of two.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] | None = None,
        norm: str = "BN",
        **options: Any,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise UserError(f"TimmBackbone: norm={norm} must be one of {', '.join(_NORMS)}")
        options = {key: _plain(value) for key, value in options.items()}
        model, options = _create(name, options)
        self.arguments = {"name": name, **options}
        places = _places(name, model)
        chosen = [key for key in places if key != "res1"] if out_features is None else out_features
        missing = [key for key in chosen if key not in places]
        if missing or not chosen:
            raise UserError(
                f"TimmBackbone: out_features={list(chosen)}: the maps of {name} are "
                f"{', '.join(places)}"
            )
        self._out_features = [key for key in places if key in chosen]  # finest first
        info = [model.feature_info[places[key]] for key in self._out_features]
        self._out_feature_channels = {
            key: entry["num_chs"] for key, entry in zip(self._out_features, info, strict=True)
        }
        self._out_feature_strides = {
            key: entry["reduction"] for key, entry in zip(self._out_features, info, strict=True)
        }
        self._indices = model.prune_intermediate_layers(
            [places[key] for key in self._out_features], prune_norm=True
        )
        self._size = _fixed_size(model, options)
        self.timm = _with_norm(model, norm)

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride."""
        return max(self._out_feature_strides.values())

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The coarsest stride, and the side length of a model that accepts no other images."""
        square = self._size[0] if self._size and self._size[0] == self._size[1] else 0
        return {"size_divisibility": self.size_divisibility, "square_size": square}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` images to maps ``(B, C, h, w)``, finest first.

        Raises:
            UserError: the images do not have the size that the model was built for.
        """
        size = tuple(images.shape[-2:])
        if self._size and size != self._size:
            raise UserError(
                f"timm's {self.arguments['name']} was built for images of {self._size} pixels, not "
                f"{size}: set img_size={list(size)} in its options, or pad the images with the "
                "pyramid's square_pad"
            )
        maps = self.timm.forward_intermediates(
            images, indices=self._indices, intermediates_only=True
        )
        return dict(zip(self._out_features, maps, strict=True))


def create_timm_model(name: str, **options: Any) -> nn.Module:
    """``timm.create_model`` without weights and classifier.

    Raises:
        UserError: timm is not installed, or has no such model.
    """
    timm = _timm()
    if not timm.is_model(name):
        plain = name.partition(".")[0]
        hint = did_you_mean(plain, timm.list_models(), 3, 0.5, "; see timm.list_models()")
        raise UserError(f"timm {timm.__version__} has no model {name!r}{hint}")
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "this backbone needs timm, which is not installed: pip install timm, or "
            "pip install 'region_pretrain[timm]'"
        ) from error
    return timm


def _plain(value: Any) -> Any:
    """A value of a config without OmegaConf's containers."""
    is_node = isinstance(value, ListConfig | DictConfig)
    return OmegaConf.to_container(value, resolve=True) if is_node else value


def _create(
    name: str, options: dict[str, Any], any_size: Sequence[dict[str, bool]] = _ANY_SIZE
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model, for images of any size if possible; also returns its options."""
    given = {**any_size[0], **options}
    try:
        return create_timm_model(name, **given), given
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument\S* \[?'(\w+)'", str(error))
        if refused is None or refused[1] not in given:
            raise
        if refused[1] in options:
            raise UserError(f"TimmBackbone: {name} has no option {refused[1]}: {error}") from error
    return _create(name, options, any_size[1:])


def _places(name: str, model: nn.Module) -> dict[str, int]:
    """Name of each map -> its index in the model's ``feature_info``, finest first."""
    ready = all(hasattr(model, method) for method in _REQUIRED)
    strides = [entry["reduction"] for entry in getattr(model, "feature_info", None) or ()]
    if not ready or not strides:
        raise UserError(
            f"timm's {name} has no intermediate feature maps: choose a model whose feature_info "
            "lists them, such as convnext_tiny"
        )
    levels = [math.log2(stride) for stride in strides]
    places = {f"res{int(level)}": i for i, level in enumerate(levels) if level % 1 == 0 < level}
    if not places:
        raise UserError(
            f"timm's {name} has stride {strides[-1]}, which is not a power of two as Detectron2's "
            "pyramids need: set patch_size=16 in its options, or choose another model"
        )
    return places


def _fixed_size(model: nn.Module, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(height, width)`` of the images if the model accepts no others."""
    if any(options.get(key) == value for way in _ANY_SIZE for key, value in way.items()):
        return None
    if not model.pretrained_cfg["fixed_input_size"]:
        return None
    size = options.get("img_size") or model.pretrained_cfg["input_size"][1:]
    return (size, size) if isinstance(size, int) else tuple(size)


def _with_norm(model: nn.Module, norm: str) -> nn.Module:
    if norm == "SyncBN":
        return _timm().layers.convert_sync_batchnorm(model)
    if norm == "FrozenBN":
        return _timm().layers.freeze_batch_norm_2d(model)
    return model
