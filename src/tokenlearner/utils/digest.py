"""Digests of weights, by which a file knows the model that it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_tensors(tensors: Mapping[str, Tensor], *options: object) -> str:
    """Returns SHA-256 of tensors' names, types, shapes and bytes, whatever their order and device.

    Args:
        tensors: Such as a state dict.
        options: What else makes a difference, by its `repr`.
    """
    digest = hashlib.sha256(repr(options).encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {plain.dtype} {list(tensor.shape)} ".encode())
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
