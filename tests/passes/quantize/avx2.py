"""Integer kernels in numpy as a CPU without VNNI computes them: products are added in twos, in 16 bits that saturate.

``fxopt/pair_sums.py`` says which two. ``exact=True`` computes the same without the saturation, as VNNI does.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["accumulate", "convolution", "matmul", "oracle_missing", "requantize", "worst_rows"]

Integers = NDArray[np.integer]


def oracle_missing() -> str | None:
    """Return why ORT on this machine does not saturate as emulated here, or None if it does."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"{platform.machine()} has no vpmaddubsw"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "no /proc/cpuinfo to tell whether the CPU has VNNI"
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())
    if "avx2" not in flags:
        return "the CPU has no AVX2"
    found = sorted(flag for flag in flags if "vnni" in flag)
    return f"the CPU has {', '.join(found)}, and does not saturate" if found else None


def worst_rows(weight: Integers, largest: int = 255) -> NDArray[np.uint8]:
    """Return what hurts i8[out, K] most, u8[2 out, K]: ``largest`` at the weights of one sign, 0 elsewhere."""
    return np.concatenate([largest * (weight > 0), largest * (weight < 0)]).astype(np.uint8)


def accumulate(activations: Integers, weight: Integers, *, exact: bool = False) -> NDArray[np.int64]:
    """Return u8[..., K] times i8[K, N] as integers, [..., N]; two products at a time, ends cut off unless ``exact``."""
    first, second = (
        activations[..., side::2, None].astype(np.int64) * weight[side::2].astype(np.int64) for side in (0, 1)
    )
    if first.shape[-2] > second.shape[-2]:
        second = np.concatenate([second, np.zeros_like(first[..., :1, :])], -2)
    sums = first + second
    return (sums if exact else sums.clip(-32768, 32767)).sum(-2)


def matmul(
    activations: Integers, weight: Integers, zero_points: tuple[int, int] = (0, 0), *, exact: bool = False
) -> NDArray[np.int64]:
    """Return the product of u8[..., K] and i8[K, N] less their zero points, which are subtracted from the sums."""
    zero, weight_zero = zero_points
    rows = activations.astype(np.int64).sum(-1)[..., None]
    columns = weight.astype(np.int64).sum(0)
    corrections = rows * weight_zero + zero * columns - len(weight) * zero * weight_zero
    return accumulate(activations, weight, exact=exact) - corrections


def convolution(
    image: Integers,
    weight: Integers,
    zero_point: int = 0,
    *,
    strides: Sequence[int] | None = None,
    padding: int = 0,
    groups: int = 1,
    exact: bool = False,
) -> NDArray[np.int64]:
    """Return the convolution of u8[N, C, spatial...] and i8[out, C / groups, kernel...], [N, out, spatial...].

    The image becomes rows of (position of the kernel, channel), channels fastest, which a matrix product takes. Where
    each group has one channel to read and one to write, ORT multiplies one by one in wider integers, always exactly.
    """
    _, channels, *sizes = image.shape
    out, per_group, *kernel = weight.shape
    axes = len(sizes)
    padded = np.pad(image, [(0, 0), (0, 0), *[(padding, padding)] * axes], constant_values=zero_point)
    windows = sliding_window_view(padded, tuple(kernel), axis=tuple(range(2, 2 + axes)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides or [1] * axes))]
    exact |= per_group == 1 and out == groups
    results = []
    for group in range(groups):
        mine = slice(group * per_group, (group + 1) * per_group)
        rows = np.moveaxis(windows[:, mine], 1, -1)
        rows = rows.reshape(*rows.shape[: 1 + axes], -1)
        columns = np.moveaxis(weight[group * (out // groups) : (group + 1) * (out // groups)], 1, -1)
        results.append(matmul(rows, columns.reshape(len(columns), -1).T, (zero_point, 0), exact=exact))
    assert channels == groups * per_group
    return np.moveaxis(np.concatenate(results, -1), -1, 1)


def requantize(
    sums: NDArray[np.int64], input_scale: float, weight_scale: NDArray[np.float32], output_scale: float, zero_point: int
) -> NDArray[np.uint8]:
    """Return sums of [..., N] as u8, in float32 steps as MLAS takes them."""
    scale = np.float32(input_scale) * weight_scale.astype(np.float32) / np.float32(output_scale)
    steps = sums.astype(np.float32) * scale
    low, high = np.float32(-zero_point), np.float32(255 - zero_point)
    return (np.rint(steps.clip(low, high)) + zero_point).astype(np.uint8)
