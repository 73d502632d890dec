"""Bring a student's value to the shape of a teacher's: sizes first, then features by a trained projection.

    [batch, channels, ...]     axes behind the channels: averaged where they shrink, interpolated where they grow
                               channels: a convolution of size 1
    [..., features]            features: a linear layer; all other axes must agree

Source: the regressor of Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, section 2.2, in its form for
convolutions, with a kernel of size 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.args import shape_text
from fxopt.errors import PassError, describe

__all__ = ["Resize", "adapter", "channel_axis_of", "describe_adapter", "projection", "resizing"]

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
_AVERAGE: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def channel_axis_of(value: torch.Tensor, given: int | None) -> int:
    """Return the axis of the channels or features, counted from 0.

    If it is not given, that is axis 1 of maps (rank 4 and 5), and the last axis of anything else.

    Raises:
        PassError: there is no such axis, or it is that of the batch.
    """
    wanted = (1 if value.ndim in (4, 5) else -1) if given is None else given
    axis = wanted + value.ndim if wanted < 0 else wanted
    if not 0 < axis < value.ndim:
        raise PassError(
            describe(
                f"axis {wanted} of a value of rank {value.ndim} has no channels",
                got=shape_text(value),
                wanted="an axis behind that of the batch, 0",
            )
        )
    return axis


class Resize(nn.Module):
    """Bring the axes behind the channels to the sizes of another map.

    Where no size grows it averages (``adaptive_avg_pool``); else, or where sizes are known at run time alone, it
    interpolates linearly, with ``align_corners=False``.
    """

    def __init__(self, axes: int, *, shrinks: bool) -> None:
        """Args: axes: number of axes behind the channels, 1 to 3. shrinks: whether no size grows."""
        super().__init__()
        self.axes, self.shrinks = axes, shrinks

    def forward(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return ``value``, [batch, channels, ...], with the sizes of ``like``."""
        sizes = like.shape[2:]
        if self.shrinks:
            return _AVERAGE[self.axes](value, sizes)  # type: ignore[no-any-return]  # the table tells no types
        return F.interpolate(value, size=sizes, mode=_INTERPOLATION[self.axes], align_corners=False)


def adapter(student: torch.Tensor, teacher: torch.Tensor, axis: int) -> tuple[Resize | None, nn.Module | None]:
    """Return what brings the student's value to the teacher's shape: first a change of sizes, then a projection.

    Args:
        student: The student's value, or a fake one; dynamic sizes are SymInts.
        teacher: The teacher's value.
        axis: The axis of channels or features in both; see :func:`channel_axis_of`.

    Raises:
        PassError: there is no way to a common shape.
    """
    return resizing(student, teacher, axis), projection(student, teacher, axis)


def resizing(student: torch.Tensor, teacher: torch.Tensor, axis: int) -> Resize | None:
    """Return what brings the axes behind the channels to the teacher's sizes; see :func:`adapter`."""
    if student.ndim != teacher.ndim:
        raise _no_common_shape(student, teacher, "they differ in rank")
    different = [
        index
        for index, (a, b) in enumerate(zip(student.shape, teacher.shape, strict=True))
        if str(a) != str(b) and index != axis
    ]
    if not different:
        return None
    if 0 in different or axis != 1 or student.ndim - 2 not in _CONVOLUTIONS:
        raise _no_common_shape(student, teacher, f"axis {different[0]} has two sizes, and does not lie behind channels")
    sizes = zip(student.shape[2:], teacher.shape[2:], strict=True)
    return Resize(student.ndim - 2, shrinks=all(_is_known_to_shrink(a, b) for a, b in sizes))


def projection(student: torch.Tensor, teacher: torch.Tensor, axis: int) -> nn.Module | None:
    """Return the layer that brings the channels or features to the teacher's; see :func:`adapter`."""
    inputs, outputs = student.shape[axis], teacher.shape[axis]
    if str(inputs) == str(outputs):
        return None
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        raise _no_common_shape(student, teacher, f"the size of axis {axis} is known at run time alone")
    if axis == student.ndim - 1:
        return nn.Linear(inputs, outputs, dtype=_wide(student.dtype))
    if axis != 1 or student.ndim - 2 not in _CONVOLUTIONS:
        raise _no_common_shape(student, teacher, f"channels along axis {axis} of rank {student.ndim}")
    return _CONVOLUTIONS[student.ndim - 2](inputs, outputs, 1, dtype=_wide(student.dtype))  # type: ignore[no-any-return]  # the table tells no types


def describe_adapter(resize: Resize | None, project: nn.Module | None) -> str | None:
    """Return in words what the adapter does, or None if there is none."""
    parts = []
    if resize is not None:
        parts.append("sizes averaged" if resize.shrinks else "sizes interpolated")
    if isinstance(project, nn.Linear):
        parts.append(f"linear layer of {project.in_features} to {project.out_features} features")
    elif project is not None:
        parts.append(f"convolution of size 1 of {project.in_channels} to {project.out_channels} channels")
    return ", ".join(parts) or None


def _is_known_to_shrink(a: Any, b: Any) -> bool:
    return str(a) == str(b) or (isinstance(a, int) and isinstance(b, int) and a >= b)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which values of ``dtype`` are compared; see :func:`fxopt.normalization_ops.widened`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _no_common_shape(student: torch.Tensor, teacher: torch.Tensor, reason: str) -> PassError:
    return PassError(
        describe(
            f"the values of student and teacher have no common shape: {reason}",
            got=f"student {shape_text(student)}, teacher {shape_text(teacher)}",
            wanted="[batch, channels, ...] of any sizes behind the channels, or [..., features] of any features",
            try_="other values; channel_axis=1 or -1; a SimilarityLoss, which compares values of any shapes",
        )
    )
