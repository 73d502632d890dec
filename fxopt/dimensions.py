"""Dynamic sizes: how users write them, what torch.export wants, and samples of other sizes.

A user writes a dimension as a name with optional bounds (``"batch"``, ``"seq<512"``, ``"2<=seq<=64"``), as a
``torch.export.Dim``, or not at all: sizes that differ between several samples are dynamic.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError, describe

__all__ = ["Dimension", "Sample", "dimensions_from_samples", "parse_dimension", "resize", "traceable"]

_BOUNDED = re.compile(
    r"^\s*(?:(?P<low>\d+)\s*(?P<low_op><=?)\s*)?(?P<name>[A-Za-z_]\w*)\s*(?:(?P<high_op><=?)\s*(?P<high>\d+)\s*)?$"
)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One dynamic size of a captured graph.

    Attributes:
        name: What the user calls it; the ``dim_param`` of the ONNX file.
        symbol: What torch calls it, such as ``s77``.
        min: Smallest size the graph is valid for.
        max: Largest size the graph is valid for, or None if unbounded.
    """

    name: str
    symbol: str
    min: int = 0
    max: int | None = None

    def allows(self, size: int) -> bool:
        """Return whether the graph is valid for this size."""
        return self.min <= size and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        low = f"{self.min}<=" if self.min > 0 else ""
        return f"{low}{self.name}" + (f"<={self.max}" if self.max is not None else "")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One set of example inputs: positional and keyword arguments of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> Sample:
        """Return the sample that ``example`` stands for: a Sample, a tuple, a mapping (keywords), or one argument."""
        if isinstance(example, Sample):
            return example
        if isinstance(example, tuple) and not hasattr(example, "_fields"):
            return cls(example)
        if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
            return cls((), dict(example))
        return cls((example,))

    def leaves(self) -> list[Any]:
        """Return the leaves of the arguments in pytree order."""
        return pytree.tree_leaves((self.args, dict(self.kwargs)))

    def map(self, function: Callable[[Any], Any]) -> Sample:
        """Return the sample with ``function`` applied to every leaf."""
        args, kwargs = pytree.tree_map(function, (self.args, dict(self.kwargs)))
        return Sample(args, kwargs)

    def clone(self) -> Sample:
        """Return the sample with copies of its tensors, for a model that writes into its inputs."""
        return self.map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)

    def other_ways(self) -> Iterator[tuple[str, Sample]]:
        """Yield samples whose values may branch another way, each with its label: smaller, larger and negated ones."""

        def scaled(leaf: Any, factor: float) -> Any:
            return leaf * factor if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

        for factor in (0.1, 10.0, -1.0):
            yield f"times {factor:g}", self.map(functools.partial(scaled, factor=factor))

    def with_leaves(self, leaves: Sequence[Any]) -> Sample:
        """Return the sample of the same structure with other leaves."""
        spec = pytree.tree_structure((self.args, dict(self.kwargs)))
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        return Sample(args, kwargs)


def parse_dimension(text: str) -> Any:
    """Return the ``torch.export.Dim`` that ``text`` describes: a name, with bounds if wanted.

    Raises:
        ValueError: the text is not of the form ``name``, ``name<64``, ``2<=name<=64``; or no size fits the bounds.
    """
    found = _BOUNDED.match(text)
    if not found:
        raise ValueError(
            f"dimension {text!r} is not a name with optional bounds; write for example 'batch' or '2<=seq<512'"
        )
    low = int(found["low"]) + (found["low_op"] == "<") if found["low"] else None
    high = int(found["high"]) - (found["high_op"] == "<") if found["high"] else None
    if low is not None and high is not None and low > high:
        raise ValueError(f"dimension {text!r} allows no size: {low} > {high}")
    return Dim(found["name"], min=low, max=high)


def bind_arguments(forward: Callable[..., Any], sample: Sample) -> dict[str, Any]:
    """Return the arguments by the name of forward's parameter, in the order of its signature.

    Raises:
        CaptureError: the inputs do not fit the signature.
    """
    try:
        return dict(inspect.signature(forward).bind(*sample.args, **sample.kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            describe(
                f"the example inputs do not fit the model: {error}",
                got=f"{len(sample.args)} positional, keywords {', '.join(sample.kwargs) or '(none)'}",
                wanted=f"forward{inspect.signature(forward)}",
                try_="pass a tuple for positional arguments, a dict for keyword arguments, "
                "or fxopt.Sample(args, kwargs)",
            )
        ) from None


def named_dynamic_shapes(dynamic_shapes: Any, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ``dynamic_shapes`` as torch.export wants it: by argument name, complete, texts made into ``Dim`` objects.

    Raises:
        CaptureError: it names an argument that the model does not have.
    """
    if dynamic_shapes is None:
        return None
    if not isinstance(dynamic_shapes, Mapping):
        if len(dynamic_shapes) > len(arguments):
            raise CaptureError(f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(arguments)} arguments")
        dynamic_shapes = dict(zip(arguments, dynamic_shapes, strict=False))
    unknown = sorted(set(dynamic_shapes) - set(arguments))
    if unknown:
        raise CaptureError(
            describe(
                f"dynamic_shapes names {', '.join(map(repr, unknown))}, which the model is not called with",
                wanted=f"any of {', '.join(map(repr, arguments))}",
            )
        )
    known: dict[str, Any] = {}

    def dim(entry: Any) -> Any:
        if isinstance(entry, str):
            parsed = parse_dimension(entry)
            kept = known.setdefault(parsed.__name__, parsed)
            if (kept.min, kept.max) != (parsed.min, parsed.max) and entry.strip() != parsed.__name__:
                raise CaptureError(f"dimension {parsed.__name__!r} is given two different ranges; give it one")
            return kept
        if isinstance(entry, Mapping):
            return {key: dim(item) for key, item in entry.items()}
        if isinstance(entry, list | tuple):
            return type(entry)(dim(item) for item in entry)
        return entry

    return {name: dim(dynamic_shapes.get(name)) for name in arguments}


def dynamic_axes(arguments: Any, shapes: Any) -> Iterator[tuple[torch.Tensor, dict[int, Any]]]:
    """Yield every tensor of ``arguments`` with its ``{axis: Dim}``, walking arguments and shapes side by side."""
    if isinstance(arguments, torch.Tensor):
        if isinstance(shapes, Mapping):
            yield arguments, {axis: dim for axis, dim in shapes.items() if dim is not None and not isinstance(dim, int)}
        elif isinstance(shapes, list | tuple):
            yield arguments, {a: dim for a, dim in enumerate(shapes) if dim is not None and not isinstance(dim, int)}
        else:
            yield arguments, {}
        return
    children, spec = pytree.tree_flatten(arguments, is_leaf=lambda item: item is not arguments)
    if spec.is_leaf():
        return
    if isinstance(arguments, Mapping) and isinstance(shapes, Mapping):
        below = [shapes.get(key) for key in arguments]
    elif shapes is None:
        below = [None] * len(children)
    else:
        below = pytree.tree_leaves(shapes, is_leaf=lambda item: item is not shapes)
    for child, shape in zip(children, below, strict=False):
        yield from dynamic_axes(child, shape)


def dimensions_from_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the dynamic shapes that several samples of different sizes imply, or None if all sizes agree.

    Axes whose sizes vary together share one dimension. A dimension that some input has at axis 0 is called ``batch``
    (the first such), others after their input and axis.

    Args:
        samples: The arguments of each sample, by parameter name.

    Raises:
        CaptureError: the samples differ in structure or rank.
    """
    names: dict[tuple[int, ...], str] = {}

    def merge(path: str, values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, torch.Tensor):
            if any(not isinstance(item, torch.Tensor) or item.ndim != first.ndim for item in values):
                raise CaptureError(
                    f"input {path!r} has different ranks in the samples; a graph has one rank for each input"
                )
            axes = {}
            for axis in range(first.ndim):
                sizes = tuple(item.shape[axis] for item in values)
                if len(set(sizes)) > 1:
                    fallback = "batch" if axis == 0 and "batch" not in names.values() else f"{path}_{axis}"
                    axes[axis] = names.setdefault(sizes, fallback)
            return axes or None
        if isinstance(first, Mapping):
            return {key: merge(f"{path}_{key}", [item[key] for item in values]) for key in first}
        if isinstance(first, list | tuple):
            return type(first)(merge(f"{path}_{i}", column) for i, column in enumerate(zip(*values, strict=True)))
        return None

    try:
        shapes = {name: merge(name, [sample[name] for sample in samples]) for name in samples[0]}
    except (KeyError, ValueError, TypeError) as error:
        raise CaptureError(f"the samples differ in structure: {type(error).__name__}: {error}") from None
    return shapes if names else None


def resize(tensor: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """Return ``tensor`` with the given size along each axis, its slices repeated or left out.

    All values stay legal ones, and their order stays: offsets that ascend still do.
    """
    for axis, size in sizes.items():
        old = tensor.shape[axis]
        if old != size:
            index = torch.arange(size, device=tensor.device) * old // max(size, 1)
            tensor = tensor.index_select(axis, index)
    return tensor


def traceable(sample: Sample, arguments: Mapping[str, Any], shapes: Mapping[str, Any] | None) -> Sample:
    """Return the sample as torch.export can trace it for all sizes.

    Sizes 0 and 1 are special to it, since it broadcasts along them: a dynamic axis of size 1 is enlarged to 2. And it
    asks how values lie in memory: in a slice such as ``batch[:, :t]`` the gaps would be taken for a fact about ``t``,
    so that a copy without gaps takes its place. What the graph computes does not depend on it.
    """
    if shapes is None:
        return sample
    wanted: dict[int, torch.Tensor] = {}
    for tensor, axes in dynamic_axes(dict(arguments), dict(shapes)):
        grow = {axis: 2 for axis in axes if tensor.shape[axis] == 1}
        if grow or _has_gaps(tensor):
            dense = resize(tensor, grow).detach().contiguous()
            wanted[id(tensor)] = dense.requires_grad_(tensor.requires_grad)
    return sample.map(lambda leaf: wanted.get(id(leaf), leaf))


def _has_gaps(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return 0 < tensor.numel() <= reach
