"""Peak memory of this process, and the shared memory that its loader needs."""

from __future__ import annotations

import logging
import math

import torch
from detectron2.utils import comm

from region_pretrain.engine.build import TrainingData
from region_pretrain.errors import UserError
from region_pretrain.files import free_bytes
from region_pretrain.random_state import random_state_kept
from region_pretrain.system import peak_resident_mib

logger = logging.getLogger(__name__)

SHARED_MEMORY = "/dev/shm"
#: What to do if shared memory is too small.
MORE_SHARED_MEMORY = (
    "lower dataloader.train.num_workers (0 needs none) or dataloader.train.total_batch_size, or "
    f"enlarge {SHARED_MEMORY} (docker run --shm-size={{}}g)"
)


def check_shared_memory(data: TrainingData) -> None:
    """Check that the batches of all loader workers on this machine fit into ``/dev/shm``.

    All processes call this together, before a loader has started. The size follows from one image,
    so it is an estimate if the images' sizes differ. Data without a method ``prefetched_bytes`` is
    not checked.

    Raises:
        UserError: they do not fit, on any machine.
    """
    needed = 0
    if hasattr(data, "prefetched_bytes"):
        with random_state_kept():
            try:
                needed = data.prefetched_bytes() * comm.get_local_size()
            except Exception:  # an image that cannot be loaded is reported when it is needed
                logger.debug("cannot measure a batch:", exc_info=True)
    free = free_bytes(SHARED_MEMORY)
    message = ""
    if free is not None and needed > free:
        gigabytes = math.ceil(1.5 * needed / 2**30)
        message = (
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but the batches of the loader's "
            f"workers need {needed / 2**20:.0f} MiB: {MORE_SHARED_MEMORY.format(gigabytes)}"
        )
    messages = [text for text in comm.all_gather(message) if text]
    if messages:
        raise UserError(messages[0])


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far, in MiB.

    On a GPU this is the memory of PyTorch's allocator; on a CPU, the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_mib()
