"""Convolutions and linear layers of 8-bit integers on this machine, for trials: what a runtime computes, without it.

    y = scale_x scale_w[channel] * sum((q_x - zero_point) q_w) + b        the sum in 32 bits, without error

oneDNN, which comes with torch, has them for Inductor, and with VNNI they take a third of the time of floats. A
processor without it adds pairs of products in 16 bits, where the largest integers saturate; one product of these tells.
There a layer is computed in integers if none of its sums can overflow (``fxopt/pair_sums.py``), which the weights of a
plan for such processors are chosen for. All others, and all where the operators are missing, are multiplied in floats.

Which products are a pair in oneDNN 3 was found on an AMD Zen 3 (AVX2, no VNNI) with two weights of 127 for each result:
two neighbouring channels, ``(0, 1), (2, 3), ...``, of one position of the kernel, in linear layers and convolutions
alike; the last of an odd number is alone, so one channel for each group is exact.

Of a few kinds oneDNN computes something else, such as some dilated windows of one channel, and windows that lie in the
padding altogether. So the first row of each new kind of product is held against floats, and a kind that differs is left
to them. Long windows of few channels, such as those that read sound, take oneDNN twice as long as floats: they are
copied, and multiplied as rows.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.args import arg, shape, spread
from fxopt.pair_sums import can_overflow
from fxopt.passes.quantize.layer_matrix import LayerMatrix
from fxopt.passes.quantize.placement import Site
from fxopt.passes.quantize.spec import QuantSpec
from fxopt.passes.quantize.weights import parameters_of

__all__ = ["IntegerInput", "IntegerLayer", "IntegerProduct", "Sums", "integer_layer", "matrix_product", "sums_here"]

aten = torch.ops.aten

_AXES: dict[Any, int] = {
    aten.linear.default: 0,
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
}  # along which a weight slides
_LEAST_TERMS = 2  # with one, neither oneDNN nor torch's own product of matrices is right
_MOST_TERMS = 2**31 // (255 * 128)  # of a sum that 32 bits hold, whatever the integers
_CHECKED = 16  # results of a row, more or less, that are held against floats
_FEW_CHANNELS, _LONG = 3, 64  # channels, and terms of each, from which on windows are faster as rows
_FLOATS = 1.0, 0, torch.float32
_CLOSE = 1e-3  # of the largest number: floats round, and what is wrong is far off
_right: dict[Any, bool] = {}  # kinds of products: whether they were

_NOTHING_BEHIND: tuple[Any, ...] = ("none", [], "")

Windows = tuple[list[int], list[int], list[int], int]
"""Stride, padding and dilation of a convolution along both axes, and its groups."""


class Sums(enum.Enum):
    """What the sums of a machine's integer products are."""

    EXACT = "right, whatever the integers"
    PAIRED = "right where no sum of a pair in 16 bits overflows"
    NONE = "wrong, or there are none"


@dataclasses.dataclass(frozen=True)
class IntegerInput:
    """How an activation becomes integers from 0 on.

    Attributes:
        scale: One step.
        zero_point: What stands for 0.
        largest: The largest integer, 255 at most.
    """

    scale: float
    zero_point: int
    largest: int

    @property
    def saturates(self) -> bool:
        """Whether a byte cannot hold what lies beyond its integers."""
        return self.largest == 255

    @classmethod
    def of(cls, spec: QuantSpec) -> IntegerInput | None:
        """Return that of a spec with its scale, shifted where that is signed; None if it does not fit 8 bits."""
        smallest, largest = spec.limits
        if len(spec.scale) != 1 or largest - smallest > 255:
            return None
        return cls(spec.scale[0], spec.zero_point[0] - smallest, largest - smallest)

    def integers(self, value: torch.Tensor) -> torch.Tensor:
        """Return u8 in the shape and layout of a tensor of floats, standing for what ``rounded`` makes of it."""
        steps = (value / self.scale).round_().add_(self.zero_point - 128).clamp_(-128, self.largest - 128)
        return steps.to(torch.int8).view(torch.uint8).bitwise_xor_(128)  # torch takes ten times as long to make u8

    def floats(self, integers: torch.Tensor) -> torch.Tensor:
        """Return what u8 stand for, f32."""
        found: torch.Tensor = integers.float().sub_(self.zero_point).mul_(self.scale)
        return found


class IntegerProduct:
    """The product of an input in integers with a weight in integers.

    Args:
        inputs: How the input became integers.
        weight: i8[out, in] of a linear layer, or i8[out, in, height, width] of a convolution.
        scale: Of the weight, f32[] or f32[out].
        bias: f32[out], or None.
        windows: Those of a convolution; None for a linear layer.
    """

    def __init__(
        self,
        inputs: IntegerInput,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        windows: Windows | None = None,
    ) -> None:
        self.inputs, self._bias, self._windows = inputs, bias, windows or ()
        self._weight = weight.contiguous()  # oneDNN takes its strides for granted
        self._scale = scale.expand(len(weight)).contiguous()
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        if windows is None:
            self._packed, self._product = _onednn("qlinear_prepack")(self._weight, None), _onednn("qlinear_pointwise")
        else:
            held = self._weight, self._scale, inputs.scale, inputs.zero_point, *windows
            self._packed, self._product = _onednn("qconv_prepack")(*held), _onednn("qconv_pointwise")

    def __call__(
        self, integers: torch.Tensor, shift: torch.Tensor | None = None, result: IntegerInput | None = None
    ) -> torch.Tensor:
        """Return [rows, out] for u8[rows, in], or [n, out, height, width] for u8[n, in, height, width].

        Args:
            integers: The input.
            shift: What to add to the bias, f32[out].
            result: What the product becomes, u8; it stays f32 if None.
        """
        bias = shift if self._bias is None else self._bias if shift is None else self._bias + shift
        kind = self._kind(integers, result)
        if not _right.get(kind, True):
            return self._in_floats(integers, bias, result, 1)
        found = self.unchecked(integers, bias, result)
        if kind not in _right and len(integers):
            every = max(1, len(self._weight) // _CHECKED) if not self._windows or self._windows[3] == 1 else 1
            _right[kind] = _is_close(found[:1, ::every], self._in_floats(integers[:1], bias, result, every))
            return self(integers, shift, result)
        return found

    def unchecked(
        self, integers: torch.Tensor, bias: torch.Tensor | None = None, result: IntegerInput | None = None
    ) -> torch.Tensor:
        """Return what oneDNN makes of it, right or wrong; ``bias`` is all of it."""
        quantized = integers, self.inputs.scale, self.inputs.zero_point, self._packed, self._scale, self._zeros
        becomes = _FLOATS if result is None else (result.scale, result.zero_point, torch.uint8)
        found: torch.Tensor = self._product(*quantized, bias, *self._windows, *becomes, *_NOTHING_BEHIND)
        return found

    def _kind(self, integers: torch.Tensor, result: IntegerInput | None) -> Any:
        """Return what oneDNN's choice of code may depend on."""
        windows = tuple(map(str, self._windows))
        offset = self.inputs.zero_point == 0, self._bias is None, result is None or result.zero_point == 0
        return *offset, result is None, windows, self._weight.shape, integers.shape, integers.stride()

    def _in_floats(
        self, integers: torch.Tensor, bias: torch.Tensor | None, result: IntegerInput | None, every: int
    ) -> torch.Tensor:
        """Return the same in floats; with ``every`` above 1, of one channel in so many."""
        axes = [1] * (self._weight.ndim - 1)
        x, weight = self.inputs.floats(integers), self._weight[::every] * self._scale[::every].reshape(-1, *axes)
        bias = None if bias is None else bias[::every]
        found = F.conv2d(x, weight, bias, *self._windows) if self._windows else F.linear(x, weight, bias)
        return found if result is None else result.integers(found)


def _is_close(found: torch.Tensor, want: torch.Tensor) -> bool:
    if want.dtype == torch.uint8:
        return int((found.int() - want.int()).abs().max()) <= 1
    return float((found - want).abs().max()) <= _CLOSE * float(want.abs().max())


@dataclasses.dataclass(frozen=True)
class IntegerLayer:
    """A layer computed in integers.

    Attributes:
        product: Its product.
        axes: Along which its weight slides.
        any_layout: Whether nobody asks how the result lies in memory.
        rows: The layer as a product of matrices, if its windows are multiplied as rows.
    """

    product: IntegerProduct
    axes: int
    any_layout: bool = False
    rows: LayerMatrix | None = None

    def __call__(
        self, integers: torch.Tensor, shift: torch.Tensor | None = None, result: IntegerInput | None = None
    ) -> torch.Tensor:
        """Return the result for integers of an input, in its layout; see :class:`IntegerProduct`."""
        if self.axes == 0:
            rows = self.product(integers.flatten(0, -2).contiguous(), shift, result)
            return rows.reshape(*integers.shape[:-1], rows.shape[-1])
        found = self._convolved(integers, shift, result)
        if self.axes == 1:
            return found.contiguous()
        last = integers.is_contiguous(memory_format=torch.channels_last)
        last = last and (self.any_layout or not integers.is_contiguous())  # of one channel it is both
        return found.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _convolved(self, images: torch.Tensor, shift: torch.Tensor | None, result: IntegerInput | None) -> torch.Tensor:
        """Return the result of a convolution, in any layout."""
        if self.rows is not None:
            chunks = self.rows.row_chunks(images, self.product.inputs.zero_point)
            rows = torch.cat([self.product(some, shift, result) for (some,) in chunks])
            found: torch.Tensor = rows.unflatten(0, self.rows.places(images)).movedim(-1, 1)
            return found
        if self.axes == 1:
            return self.product(images.unsqueeze(2), shift, result).squeeze(2)
        return self.product(images, shift, result)


def integer_layer(
    site: Site,
    inputs: QuantSpec,
    weight: QuantSpec,
    integers: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    any_layout: bool = False,
) -> IntegerLayer | None:
    """Return a layer that computes in integers; None if it has none of this kind here.

    Args:
        site: The layer.
        inputs: The spec of its input, with its scale.
        weight: The spec of its weight, with its scales.
        integers: Those of the weight.
        bias: f32[out], or None.
        any_layout: Whether nobody asks how the result lies in memory.
    """
    quantized = IntegerInput.of(inputs)
    if site.node.target not in _AXES or quantized is None or integers.dtype != torch.int8 or any(weight.zero_point):
        return None
    if not _LEAST_TERMS <= integers[0].numel() <= _MOST_TERMS or integers.device.type != "cpu":
        return None
    axes, dims = _AXES[site.node.target], len(shape(site.node))
    if (dims != axes + 2) if axes else (dims < 2):  # one image, or row, without others beside it
        return None
    held, rows = integers.unsqueeze(2) if axes == 1 else integers, None
    windows, (scale, _) = _windows(site, axes) if axes else None, parameters_of(weight)
    if windows is not None and _see_padding_alone(held, windows):
        return None
    if windows is not None and _are_long(held, windows):
        held, rows, windows = held.flatten(1), LayerMatrix.of(site, integers), None
    if not _is_exact(held, windows, quantized.largest):
        return None
    return IntegerLayer(IntegerProduct(quantized, held, scale, bias, windows), axes, any_layout, rows)


def matrix_product(rows: torch.Tensor, inputs: IntegerInput, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return f32[rows, out] for rows u8[rows, in] and a weight i8[out, in] with scales f32[out].

    For a weight that is multiplied once, which is not worth packing.
    """
    if not _matrix_products_work() or not _LEAST_TERMS <= rows.shape[1] <= _MOST_TERMS:
        floats: torch.Tensor = inputs.floats(rows) @ (weight * scale[:, None]).t()
        return floats
    sums = torch._int_mm(rows.bitwise_xor(128).view(torch.int8), weight.t())  # of rows less 128
    sums.add_((128 - inputs.zero_point) * weight.sum(1, dtype=torch.int32))
    return sums.float().mul_(scale * inputs.scale)


@functools.cache
def sums_here() -> Sums:
    """Return what the sums of this machine's products are: of the largest integers, and of those that fit in pairs."""
    inputs, one = IntegerInput(1.0, 0, 255), torch.ones(())
    images = torch.full((2, 64, 4, 4), 255, dtype=torch.uint8)
    rows = images.movedim(1, -1).flatten(0, 2).contiguous()

    def are_right(number: int) -> bool:
        weight = torch.full((32, 64, 1, 1), number, dtype=torch.int8)
        convolution = IntegerProduct(inputs, weight, one, windows=([1, 1], [0, 0], [1, 1], 1))
        found = convolution.unchecked(images), IntegerProduct(inputs, weight.flatten(1), one).unchecked(rows)
        return all(bool((sums == 64 * 255 * number).all()) for sums in found)

    try:
        return Sums.EXACT if are_right(127) else Sums.PAIRED if are_right(64) else Sums.NONE
    except (AttributeError, RuntimeError, TypeError):  # no such operator here, or another version of it
        return Sums.NONE


@functools.cache
def _matrix_products_work() -> bool:
    if sums_here() is not Sums.EXACT:  # without VNNI torch has a plain loop, which takes 25 times as long as floats
        return False
    matrix = torch.full((32, 64), 127, dtype=torch.int8)
    try:
        return bool((torch._int_mm(matrix, matrix.t()) == 64 * 127 * 127).all())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_exact(weight: torch.Tensor, windows: Windows | None, largest: int) -> bool:
    """Return whether this machine computes every sum of a product without error, for integers of at most ``largest``.

    Args:
        weight: i8, as :class:`IntegerProduct` takes it.
        windows: Those of a convolution.
        largest: The largest integer of the input.
    """
    if sums_here() is not Sums.PAIRED:
        return sums_here() is Sums.EXACT
    even = F.pad(weight, (0, 0) * (weight.ndim - 2) + (0, weight.shape[1] % 2))  # pairs end with a position's channels
    return not bool(can_overflow(even, groups=windows[3] if windows else 1, largest=largest).any())


def _onednn(name: str) -> Any:
    return getattr(torch.ops.onednn, name)


def _windows(site: Site, axes: int) -> Windows:
    """Return them along two axes; a weight that slides along one alone has a height of 1."""
    names = (("stride", 1), ("padding", 0), ("dilation", 1))
    stride, padding, dilation = ([still] * (2 - axes) + spread(arg(site.node, name), axes) for name, still in names)
    return stride, padding, dilation, site.groups


def _are_long(weight: torch.Tensor, windows: Windows) -> bool:
    _, channels, height, width = weight.shape
    _, _, dilation, groups = windows
    return channels <= _FEW_CHANNELS and height * width >= _LONG and groups == 1 and dilation == [1, 1]


def _see_padding_alone(weight: torch.Tensor, windows: Windows) -> bool:
    """Return whether a window lies in the padding altogether, of which oneDNN takes sums that nobody computed."""
    _, paddings, dilations, _ = windows
    extents = zip(weight.shape[2:], paddings, dilations, strict=True)
    return any(padding > dilation * (kernel - 1) for kernel, padding, dilation in extents)
