"""Turn what people have as calibration data, a loader of some kind, into samples that fit a captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.args import shape_text
from fxopt.dimensions import Sample
from fxopt.errors import CalibrationError, InputError, describe
from fxopt.graph_module import CapturedModule, InputSpec

__all__ = ["calibration_length", "calibration_of", "calibration_samples"]


def calibration_samples(gm: CapturedModule, data: Iterable[Any] | Callable[[], Iterable[Any]]) -> Iterator[Sample]:
    """Yield the items of ``data`` as samples that ``gm`` takes, one at a time and checked.

    Args:
        gm: The captured graph. Its inputs that are not tensors are constants, and need not be among the data.
        data: A torch ``DataLoader``, a list or another iterable of items, or a function that returns one. An item is a
            tensor, a tuple or list of the inputs, a mapping by input name, a :class:`fxopt.Sample`, or a pair of one of
            these and labels. Labels are told by number: for k inputs, the last of k + 1 tensors, or the second of two
            things of which the first is the k inputs. Entries of a mapping that are no inputs are left out where the
            others are exactly the inputs.

    Raises:
        CalibrationError: there are no items; an item does not fit the graph, or holds NaN or infinity; an iterator is
            used up already. The message names the item and says what to try.
        TypeError: ``data`` cannot be iterated over, or is itself one item.
    """
    if isinstance(data, torch.Tensor | Mapping | Sample | str | bytes):
        raise TypeError(
            f"calibration data are items to iterate over, and these are one {type(data).__name__}; "
            "pass a list of it, or a DataLoader"
        )
    if not _is_iterable(data) and not callable(data):
        raise TypeError(
            f"calibration data are an iterable, such as a DataLoader or a list, or a function that returns one; "
            f"got {type(data).__name__}"
        )
    return _samples(gm, data)


def calibration_of(gm: CapturedModule) -> Any:
    """Return the calibration inputs that a graph carries, or its examples: what ``calibration_samples`` takes."""
    return gm.samples if gm.calibration is None else gm.calibration


def calibration_length(data: Any) -> int | None:
    """Return how many items ``data`` has, or None if that is not known before they are read."""
    try:
        return len(data)
    except TypeError:  # as a loader of an iterable dataset raises, too
        return None


def _samples(gm: CapturedModule, data: Any) -> Iterator[Sample]:
    if inspect.isgenerator(data) and inspect.getgeneratorstate(data) == inspect.GEN_CLOSED:
        raise _used_up("the calibration data are a generator that is used up", data)
    given = data if _is_iterable(data) else data()
    if not _is_iterable(given):
        raise TypeError(f"the function of calibration data returned a {type(given).__name__}, not an iterable")
    number = -1
    for number, item in enumerate(given):
        yield _sample(gm, item, number)
    if number < 0 and iter(given) is given:
        raise _used_up("the calibration data are an iterator that gives nothing: it is empty, or used up", given)
    if number < 0:
        raise CalibrationError(
            describe(
                "the calibration data are empty",
                got=f"a {type(given).__name__} without items",
                wanted=_wanted(gm),
                try_="a loader with at least one batch; drop_last=True drops the only one if it is small",
            )
        )


def _is_iterable(data: Any) -> bool:
    if isinstance(data, type):  # called, it may give something to iterate over
        return False
    return hasattr(data, "__iter__") or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def _used_up(headline: str, data: Any) -> CalibrationError:
    return CalibrationError(
        describe(
            headline,
            got=type(data).__name__,
            try_="pass a list, or a function that returns a new iterator: data=lambda: make_batches()",
        )
    )


def _sample(gm: CapturedModule, item: Any, number: int) -> Sample:
    """Return the item as a checked sample.

    Raises:
        CalibrationError: it does not fit.
    """
    found = _read(gm, item)
    if found is None:
        raise CalibrationError(
            describe(
                f"item {number} of the calibration data has another structure than the inputs of the graph",
                got=_text(item),
                wanted=_wanted(gm),
                try_=_structure_hint(gm, item),
            )
        )
    try:
        leaves = gm.flatten_inputs(*found.args, **found.kwargs)
    except InputError as error:
        headline = str(error).splitlines()[0]
        raise CalibrationError(
            describe(
                f"item {number} of the calibration data: {headline}",
                got=_text(item),
                wanted=_wanted(gm),
                try_=_shape_hint(gm, found),
            )
        ) from None
    for leaf, spec in zip(leaves, gm.inputs, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
            raise CalibrationError(
                describe(
                    f"item {number} of the calibration data: input {spec.name!r} holds no element",
                    got=_text(item),
                    try_="leave the item out; slices behind the end of a tensor are empty",
                )
            )
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            raise CalibrationError(
                describe(
                    f"item {number} of the calibration data: input {spec.name!r} holds "
                    f"{int(leaf.isnan().sum())} NaN and {int(leaf.isinf().sum())} infinite of {leaf.numel()} values",
                    got=_text(item),
                    try_="leave the item out, or mend what makes it; a mask of -inf can be one of -1e9",
                )
            )
    return found


# ---- what an item is: decided by its structure alone, so that an error is about what the item was meant to be


def _read(gm: CapturedModule, item: Any) -> Sample | None:
    """Return the sample that an item stands for, labels dropped, or None if it has no such structure."""
    found = _inputs(gm, item)
    if found is not None:
        return found
    if not isinstance(item, tuple | list):
        return None
    tensors = [part for part in item if isinstance(part, torch.Tensor)]
    if len(tensors) == len(item) == len(_tensor_inputs(gm)) + 1:
        return _inputs(gm, tuple(item[:-1]))
    return _inputs(gm, item[0]) if len(item) == 2 else None


def _inputs(gm: CapturedModule, item: Any) -> Sample | None:
    """Return the sample that an item without labels stands for."""
    if isinstance(item, Sample):
        return item
    names = _argument_names(gm)
    if isinstance(item, Mapping):
        return _by_name(gm, item) or _by_leaves(gm, item, names)
    if isinstance(item, tuple | list):
        whole = Sample(tuple(item))
        if len(item) == len(names) and _has_structure(gm, whole):
            return whole
    return _by_leaves(gm, item, names)


def _by_leaves(gm: CapturedModule, item: Any, names: list[str]) -> Sample | None:
    """Return the sample whose tensors are those of ``item``, in order; the inputs that are no tensors are known."""
    if len(names) == 1 and _has_structure(gm, Sample((item,))):
        return Sample((item,))
    wanted = _tensor_inputs(gm)
    parts = [item] if isinstance(item, torch.Tensor) else list(item) if isinstance(item, tuple | list) else []
    if len(parts) != len(wanted) or not all(isinstance(part, torch.Tensor) for part in parts):
        return None
    return _with_constants(gm, {spec.name: part for spec, part in zip(wanted, parts, strict=True)})


def _by_name(gm: CapturedModule, item: Mapping[Any, Any]) -> Sample | None:
    """Return the sample whose arguments, or else input leaves, the mapping names."""
    arguments = {name: item[name] for name in _argument_names(gm) if name in item}
    if _has_structure(gm, Sample((), arguments)):
        return Sample((), arguments)
    wanted = _tensor_inputs(gm)
    if all(isinstance(item.get(spec.name), torch.Tensor) for spec in wanted):
        return _with_constants(gm, {spec.name: item[spec.name] for spec in wanted})
    return None


def _with_constants(gm: CapturedModule, tensors: Mapping[str, torch.Tensor]) -> Sample:
    leaves = [tensors[spec.name] if spec.is_tensor else spec.constant for spec in gm.inputs]
    args, kwargs = pytree.tree_unflatten(leaves, _structure(gm))
    return Sample(args, kwargs)


def _has_structure(gm: CapturedModule, sample: Sample) -> bool:
    try:
        leaves = gm._leaves(sample.args, sample.kwargs)
    except InputError:
        return False
    return len(leaves) == len(gm.inputs) and all(
        isinstance(leaf, torch.Tensor) == spec.is_tensor for leaf, spec in zip(leaves, gm.inputs, strict=True)
    )


def _structure(gm: CapturedModule) -> Any:
    return gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]  # torch declares the base class only


def _argument_names(gm: CapturedModule) -> list[str]:
    return list(gm.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]  # torch declares the base class only


def _tensor_inputs(gm: CapturedModule) -> list[InputSpec]:
    return [spec for spec in gm.inputs if spec.is_tensor]


# ---- what the errors say


def _wanted(gm: CapturedModule) -> str:
    return ", ".join(map(str, _tensor_inputs(gm))) or "(no inputs)"


def _text(item: Any) -> str:
    """Return an item's structure with the types of its tensors."""
    if isinstance(item, Sample):
        return ", ".join([*map(_text, item.args), *(f"{name}={_text(part)}" for name, part in item.kwargs.items())])
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{name!r}: {_text(part)}" for name, part in item.items()) + "}"
    if isinstance(item, tuple | list):
        return f"({', '.join(map(_text, item[:8]))}{', ...' if len(item) > 8 else ''})"
    return shape_text(item) if isinstance(item, torch.Tensor) else type(item).__name__


def _structure_hint(gm: CapturedModule, item: Any) -> str:
    wanted = _tensor_inputs(gm)
    names = ", ".join(spec.name for spec in wanted)
    if isinstance(item, Mapping):
        known = {*_argument_names(gm), *(spec.name for spec in gm.inputs)}
        extra = [repr(name) for name in item if name not in known]
        dropped = f"; {', '.join(extra)} would be left out" if extra else ""
        return f"a dict with the keys {', '.join(repr(spec.name) for spec in wanted)}{dropped}"
    if len(wanted) == 1:
        return f"let each item be ({names}, label), or only the {names}"
    return f"let each item be a tuple ({names}), or (({names}), label), or a dict by name"


def _shape_hint(gm: CapturedModule, sample: Sample) -> str:
    """Say what may be wrong: the size of the batch, a missing batch axis, or the element type."""
    leaves = gm._leaves(sample.args, sample.kwargs)
    for leaf, spec in zip(leaves, gm.inputs, strict=True):
        if not isinstance(leaf, torch.Tensor) or not spec.is_tensor:
            continue
        if leaf.dtype != spec.dtype:
            return f"convert input {spec.name!r} to {spec.dtype}, or give the inputs in the order of the graph"
        if leaf.ndim == len(spec.shape) - 1:
            return "give batches, not single examples: wrap the dataset in a DataLoader"
        if leaf.ndim != len(spec.shape) or not spec.shape:
            continue
        got, size = leaf.shape[0], spec.shape[0]
        if isinstance(size, int) and got != size:
            return (
                f"capture with dynamic_shapes={{{spec.name!r}: {{0: 'batch'}}}}, "
                f"or let the loader give batches of {size}, with drop_last=True"
            )
        if size in gm.dims and not gm.dims[size].allows(got):
            return f"batches of a size that {gm.dims[size]} allows, or capture with a wider range"
    return "let each item be what the model takes, in the order of its arguments, with labels last"
