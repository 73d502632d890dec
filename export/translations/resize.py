"""Upsampling, downsampling and sampling on a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxopt.export.emitter import Emitter, Value, dims, rank
from fxopt.export.registry import NotTranslated, translates
from fxopt.export.sizes import Size, product
from fxopt.export.translations.shape import out_dims

aten = torch.ops.aten


def _resized(
    emit: Emitter,
    x: Value,
    out: Sequence[Size],
    scales: Sequence[float | None] | None,
    mode: str,
    coordinates: str,
    antialias: bool = False,
    **attributes: Any,
) -> Value:
    """Return ``x`` resized to the shape ``out``. With ``scales``, positions follow them and not the ratio of sizes.

    The sizes of all axes are written: ORT's layout optimizer permutes them as if ``axes`` were not there.
    """
    common = dict(
        mode=mode, coordinate_transformation_mode=coordinates, antialias=1 if antialias else None, **attributes
    )
    if scales and all(
        _matches(size, scale, wanted) for size, scale, wanted in zip(dims(x)[2:], scales, out[2:], strict=True)
    ):
        factors = emit.constant(torch.tensor([1.0, 1.0, *scales], dtype=torch.float32))
        return emit("Resize", x, None, factors, dims=out, **common)
    if scales and any(scale is not None for scale in scales):
        raise NotTranslated("scales that are given for some axes only, or that do not yield the given size")
    return emit("Resize", x, None, None, list(out), dims=out, **common)


def _matches(size: Size, scale: float | None, out: Size) -> bool:
    """Return whether ORT, given the scale, makes as many elements as PyTorch does."""
    if scale is None:
        return False
    return not (isinstance(size, int) and isinstance(out, int)) or int(size * scale) == out


def _interpolation(align_corners: bool) -> str:
    return "align_corners" if align_corners else "half_pixel"


_LINEAR = {1: "linear1d", 2: "bilinear2d", 3: "trilinear3d"}


def _linear(emit: Emitter, x: Value, align_corners: bool, scales: Sequence[float | None] | None) -> Value:
    return _resized(emit, x, out_dims(emit), None if align_corners else scales, "linear", _interpolation(align_corners))


def _cubic(emit: Emitter, x: Value, align_corners: bool, scales: Sequence[float | None] | None) -> Value:
    """ORT's layout optimizer moves channels last, where its cubic kernel enlarges only: others get planes of one."""
    out = out_dims(emit)
    before, after = list(dims(x)), list(out)
    enlarges = all(
        isinstance(size, int) and isinstance(wanted, int) and size <= wanted
        for size, wanted in zip(before[2:], after[2:], strict=True)
    )
    if not enlarges:
        planes: list[Size] = [product(before[:2]), 1]
        before, after = planes + before[2:], planes + after[2:]
    resized = _resized(
        emit,
        emit.reshape(x, before),
        after,
        None if align_corners else scales,
        "cubic",
        _interpolation(align_corners),
        cubic_coeff_a=-0.75,
    )
    return emit.reshape(resized, out)


def _nearest(emit: Emitter, x: Value, scales: Sequence[float | None] | None) -> Value:
    return _resized(emit, x, out_dims(emit), scales, "nearest", "asymmetric", nearest_mode="floor")


def _nearest_exact(emit: Emitter, x: Value, scales: Sequence[float | None] | None) -> Value:
    return _resized(emit, x, out_dims(emit), scales, "nearest", "half_pixel", nearest_mode="round_prefer_ceil")


def _antialiased(mode: str) -> Callable[..., Value]:
    def run(emit: Emitter, x: Value, align_corners: bool, scales: Sequence[float | None] | None) -> Value:
        cubic = {"cubic_coeff_a": -0.5} if mode == "cubic" else {}
        return _resized(
            emit,
            x,
            out_dims(emit),
            None if align_corners else scales,
            mode,
            _interpolation(align_corners),
            True,
            exclude_outside=1,
            **cubic,
        )

    return run


def _aligned(run: Callable[..., Value]) -> tuple[Callable[..., Value], Callable[..., Value]]:
    """Return translations of the overload with a list of scales and of the one with a scale for each axis."""

    def of_list(
        emit: Emitter, x: Value, size: Sequence[Size] | None, align_corners: bool, scales: Sequence[float] | None
    ) -> Value:
        return run(emit, x, align_corners, scales)

    def of_numbers(emit: Emitter, x: Value, size: Sequence[Size], align_corners: bool, *scales: float | None) -> Value:
        return run(emit, x, align_corners, scales)

    return of_list, of_numbers


def _unaligned(run: Callable[..., Value]) -> tuple[Callable[..., Value], Callable[..., Value]]:
    def of_list(emit: Emitter, x: Value, size: Sequence[Size] | None, scales: Sequence[float] | None) -> Value:
        return run(emit, x, scales)

    def of_numbers(emit: Emitter, x: Value, size: Sequence[Size], *scales: float | None) -> Value:
        return run(emit, x, scales)

    return of_list, of_numbers


def _register() -> None:
    aligned = {f"upsample_{name}": _linear for name in _LINEAR.values()}
    aligned |= {
        "upsample_bicubic2d": _cubic,
        "_upsample_bilinear2d_aa": _antialiased("linear"),
        "_upsample_bicubic2d_aa": _antialiased("cubic"),
    }
    unaligned = {f"upsample_nearest{n}d": _nearest for n in (1, 2, 3)} | {
        f"_upsample_nearest_exact{n}d": _nearest_exact for n in (1, 2, 3)
    }
    for table, pair in ((aligned, _aligned), (unaligned, _unaligned)):
        for name, run in table.items():
            of_list, of_numbers = pair(run)
            translates(getattr(aten, name).vec)(of_list)
            translates(getattr(aten, name).default)(of_numbers)


_register()


@translates(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(emit: Emitter, x: Value, grid: Value, mode: int, padding: int, align_corners: bool) -> Value:
    if emit.opset < 20 and rank(x) != 4:
        raise NotTranslated(f"grid_sample in three dimensions needs opset 20, not {emit.opset}")
    modes = ("linear", "nearest", "cubic") if emit.opset >= 20 else ("bilinear", "nearest", "bicubic")
    paddings = ("zeros", "border", "reflection")
    return emit(
        "GridSample", x, grid, mode=modes[mode], padding_mode=paddings[padding], align_corners=int(align_corners)
    )


@translates(aten.affine_grid_generator.default)
def affine_grid(emit: Emitter, theta: Value, size: Sequence[Size], align_corners: bool) -> Value:
    if emit.opset < 20:
        raise NotTranslated(f"affine_grid needs opset 20, not {emit.opset}")
    assert dims(theta)
    return emit("AffineGrid", theta, list(size), align_corners=int(align_corners))
