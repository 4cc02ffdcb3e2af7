"""A first-in-first-out queue of keys: the negatives of the MoCo family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import gather_rows


class KeyQueue(nn.Module):
    """The newest keys of all processes, identical on each of them.

    It starts full of random unit vectors (MoCo, arXiv 1911.05722, section 3.2 and its release). It
    is a ring buffer: keys wrap around its end, so none is dropped whatever their number. Keys and
    pointer are buffers, so checkpoints contain them. Nothing here synchronises with the device.

    Attributes:
        of_images: whether each image adds one key, so that a queue longer than the data set has
            keys of the query's own image among the negatives; a method changes it.
        keys: ``(length, dim)`` float32.
        pointer: ``()`` int64, the position of the next key.

    Args:
        length: number of keys.
        dim: channels per key.

    Raises:
        UserError: a length or dimension below 1.
    """

    of_images = True

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise UserError(f"a queue with length={length} and dim={dim}: both must be at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys)

    def check_head(self, head: nn.Module, key: str) -> None:
        """Check that a head computes vectors of the keys' dimension.

        Args:
            head: its last linear layer is looked at.
            key: config key of the queue.

        Raises:
            UserError: it does not.
        """
        linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
        dim = self.keys.shape[1]
        if linear and linear[-1].out_features != dim:
            raise UserError(
                f"{key}.dim={dim}: must be {linear[-1].out_features}, the output_dim of its head"
            )

    def negatives(self) -> Tensor:
        """A copy of the keys, ``(length, dim)``: enqueuing before the backward pass is safe."""
        return self.keys.clone()

    @torch.no_grad()
    def enqueue(self, keys: Tensor, valid: Tensor | None = None) -> None:
        """Add the keys of all processes, rank by rank; a collective call.

        Processes with different numbers of keys pad them to the same size and mark the keys in
        ``valid``. If there are more keys than the queue is long, the last ones are kept.

        Args:
            keys: ``(N, dim)``; N is the same on every process.
            valid: ``(N,)`` bool, on the keys' device; all True by default.
        """
        keys = gather_rows(keys.to(self.keys.dtype))
        if valid is None:
            valid = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        else:
            valid = gather_rows(valid.to(torch.uint8)).bool()
        total = valid.sum()
        # Sorted: padding first, then the keys in order; the last `rows` of all are written. Padding
        # falls on the places before the pointer, which are written with their own content.
        rows = min(len(keys), len(self))
        order = torch.argsort(valid.to(torch.uint8), stable=True)[len(keys) - rows :]
        places = self.pointer + total - rows + torch.arange(rows, device=keys.device)
        places = places.remainder(len(self))
        new = torch.where(valid[order, None], keys[order], self.keys[places])
        self.keys.index_copy_(0, places, new)
        self.pointer.add_(total).remainder_(len(self))
