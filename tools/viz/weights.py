"""Statistics of weights, for the histograms of the page."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import torch

from fxopt.args import shape_text
from fxopt.tools.viz.model import Weight

__all__ = ["describe_tensor"]

_PARTS = 32  # of a histogram


def describe_tensor(name: str, argument: str, tensor: torch.Tensor) -> Weight:
    """Return what the page shows of a tensor that a node reads.

    Args:
        name: Name of the tensor.
        argument: What it is to the node.
        tensor: Any tensor; of one without values, such as a FakeTensor, only the type is told.
    """
    known = Weight(name, argument, shape_text(tensor), tensor.numel() * tensor.element_size(), tensor.numel())
    if tensor.is_meta or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_complex():
        return known
    held = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16] if held.numel() else ""
    values = (held.float() if held.dtype is not torch.float64 else held).reshape(-1).numpy()
    finite = values if np.isfinite(values).all() else values[np.isfinite(values)]
    if not finite.size:
        zeros = int(values.size - np.count_nonzero(values))
        return dataclasses.replace(known, zeros=zeros, digest=digest, not_finite=int(values.size))
    low, high = float(finite.min()), float(finite.max())
    counts = (
        (int(finite.size),)
        if low == high or not math.isfinite(high - low)
        else tuple(map(int, np.histogram(finite.astype(np.float64), _PARTS, (low, high))[0]))
    )
    return dataclasses.replace(
        known,
        zeros=int(values.size - np.count_nonzero(values)),
        low=low,
        high=high,
        mean=float(finite.mean(dtype=np.float64)),
        deviation=float(finite.std(dtype=np.float64)),
        counts=counts,
        not_finite=int(values.size - finite.size),
        digest=digest,
    )
