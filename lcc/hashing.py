"""Networks and numbers told apart by a hash."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def hash_of_weights(model: nn.Module) -> str:
    """Return a short hash of all parameters and buffers, by their names."""
    tensors = sorted(model.state_dict().items())
    return short_hash(*(name.encode() + bytes_of(tensor) for name, tensor in tensors))


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's numbers as bytes, whatever its type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def short_hash(*parts: bytes) -> str:
    """Return a hash of 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
