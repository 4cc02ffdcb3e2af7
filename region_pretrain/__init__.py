"""Region-level self-supervised pre-training of Detectron2 detectors."""

import os

__version__ = "0.1.0"

# PyTorch reads this when it is imported. By default, the threads of OpenMP spin while they wait for
# each other, which makes a training many times slower as soon as any other process computes.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
