"""Region-level self-supervised pre-training of Detectron2 detectors."""

__version__ = "0.1.0"
