"""A first-in-first-out queue of keys: the negatives of the MoCo family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import gather_rows


class KeyQueue(nn.Module):
    """The newest keys of all processes, the same and in the same place on each of them.

    Starts full of random unit vectors (MoCo, arXiv 1911.05722, section 3.2 and its release). It is
    a ring: keys that reach its end go on at its beginning, so none is ever dropped, whatever
    their number. Keys and pointer are buffers, so a checkpoint holds them, and nothing here
    waits for the device.

    Attributes:
        keys: ``(length, dim)`` float32.
        pointer: ``()`` int64, where the next key goes.

    Args:
        length: number of keys.
        dim: channels of a key.

    Raises:
        UserError: a length or dimension below 1.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        if length < 1 or dim < 1:
            raise UserError(f"a queue of {length} keys of {dim} channels: both are at least 1")
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys)

    def negatives(self) -> Tensor:
        """``(length, dim)``: the keys as they are now, for a loss whose backward comes later."""
        return self.keys.clone()

    @torch.no_grad()
    def enqueue(self, keys: Tensor, valid: Tensor | None = None) -> None:
        """Add the keys of all processes, rank by rank; every process calls it together.

        Processes with different numbers of keys give tensors of one size, in which ``valid`` says
        what is a key. Of more keys than the queue is long, the last ones stay.

        Args:
            keys: ``(N, dim)``; N is the same on every process.
            valid: ``(N,)`` bool, on the device of the keys; all of them where left out.
        """
        keys = gather_rows(keys.to(self.keys.dtype))
        if valid is None:
            valid = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        else:
            valid = gather_rows(valid.to(torch.uint8)).bool()
        total = valid.sum()
        # What is no key comes first, then the keys in order; the last `rows` of them are written.
        # The places before the pointer, where the former would go, get what they hold already.
        rows = min(len(keys), len(self))
        order = torch.argsort(valid.to(torch.uint8), stable=True)[len(keys) - rows :]
        places = self.pointer + total - rows + torch.arange(rows, device=keys.device)
        places = places.remainder(len(self))
        new = torch.where(valid[order, None], keys[order], self.keys[places])
        self.keys.index_copy_(0, places, new)
        self.pointer.add_(total).remainder_(len(self))
