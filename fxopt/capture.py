"""Turn a model into one graph: ``fxopt.capture``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from fxopt.args import shape_text
from fxopt.attributes import attach
from fxopt.control_flow import fold_regions
from fxopt.dimensions import Dimension, Sample, bind_arguments, dimensions_from_samples
from fxopt.eager import compare, compare_other_ways, run_eagerly
from fxopt.errors import CaptureError, describe
from fxopt.function_module import as_module
from fxopt.graph_module import CapturedModule
from fxopt.interface import input_spec, output_names, unused_name
from fxopt.mode_alignment import renumber_regions
from fxopt.modes import Unmergeable, merge_modes
from fxopt.other_sizes import OtherSizesError, compare_other_sizes
from fxopt.regions import holds_control_flow
from fxopt.trace import Trace, trace, unlift

__all__ = ["capture", "switched"]


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., Any],
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    modes: Literal["both", "current"] = "both",
    verify: bool = True,
) -> CapturedModule:
    """Return ``model`` as one functional ATen graph in which every node knows its shape, module and source line.

    Parameters are shared with the model, not copied: training the graph trains the model.

    Args:
        model: A module, a ``torch.fx.GraphModule``, a ``torch.export.ExportedProgram`` or a function of tensors.
        example_inputs: A tuple of positional arguments, a mapping of keyword arguments, one tensor, or a
            :class:`fxopt.Sample` of both; or a *list* of such samples. Not needed for a program that has its own.
        dynamic_shapes: As for ``torch.export.export``, or with texts: ``{"x": {0: "batch", 1: "2<=seq<512"}}``. If not
            given, the axes along which several samples differ in size are dynamic.
        modes: ``"both"`` traces a model that asks for its training flag once in each mode, so that ``train()`` and
            ``eval()`` work on the graph. ``"current"`` traces it as it is.
        verify: Compare the graph with the model, bit for bit, on all samples, and up to rounding for sizes 0 and 1 of
            the dynamic axes.

    Raises:
        CaptureError: the model cannot become one graph, or the inputs do not fit it. The message names the user's line.
        TypeError: ``model`` is none of the above.
    """
    if modes not in ("both", "current"):
        raise ValueError(f"modes is {modes!r}; wanted 'both' or 'current'")
    if isinstance(model, CapturedModule):
        return _recaptured(model, example_inputs, dynamic_shapes)
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model, example_inputs)
    module = as_module(model)
    samples = _samples(example_inputs)
    for sample in samples:
        bind_arguments(module.forward, sample)
        _check_leaves(sample)
    _check_parameters(module)
    if dynamic_shapes is None and len(samples) > 1:
        dynamic_shapes = dimensions_from_samples([bind_arguments(module.forward, sample) for sample in samples])
    wanted = [run_eagerly(module, sample) for sample in samples]

    def traced(*, size_one_branches: bool = False) -> CapturedModule:
        gm, any_sizes = _traced(module, samples, dynamic_shapes, modes, size_one_branches=size_one_branches)
        if verify:
            for sample, want in zip(samples, wanted, strict=True):
                compare(gm, module, sample, want)
            if holds_control_flow(gm):
                compare_other_ways(gm, module, samples)
            compare_other_sizes(gm, module, any_sizes=any_sizes)
        return gm

    try:
        return traced()
    except OtherSizesError as error:
        if 1 not in error.sizes.values():
            raise  # no symbol of torch's is 0
        try:
            return traced(size_one_branches=True)
        except OtherSizesError:
            raise error from None  # no branch in the model's code is what differs, or it changes the rank
        except CaptureError as again:
            raise error.because(f"as a branch: {again}") from again


def _recaptured(gm: CapturedModule, example_inputs: Any, dynamic_shapes: Any) -> CapturedModule:
    """Return a copy of a captured graph, with other samples if given: its sizes are what they are."""
    if dynamic_shapes is not None:
        raise CaptureError(
            describe(
                "dynamic_shapes cannot be given for a graph that is captured already",
                got=", ".join(map(str, gm.inputs)),
                try_="capture the model itself again",
            )
        )
    copy = gm.clone()
    if example_inputs is not None:
        copy.samples = _samples(example_inputs)
        for sample in copy.samples:
            copy.flatten_inputs(*sample.args, **sample.kwargs)
    return copy


def _samples(example_inputs: Any) -> tuple[Sample, ...]:
    if example_inputs is None:
        raise CaptureError(
            describe(
                "example_inputs are missing",
                wanted="a tuple of positional arguments, a dict of keyword arguments, one tensor, "
                "or a list of such samples",
            )
        )
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise CaptureError("example_inputs is an empty list; give at least one sample")
        return tuple(Sample.of(example) for example in example_inputs)
    return (Sample.of(example_inputs),)


def _check_leaves(sample: Sample) -> None:
    for path, leaf in pytree.tree_flatten_with_path((sample.args, dict(sample.kwargs)))[0]:
        where = "example input " + pytree.keystr(path[1:])
        if isinstance(leaf, torch.Tensor):
            if leaf.numel() == 0:
                raise CaptureError(
                    describe(
                        f"{where} holds no element, so that nothing can be checked with it",
                        got=shape_text(leaf),
                        try_="an example of size 1 or more; a dynamic dimension still allows 0 later",
                    )
                )
        elif leaf is not None and not isinstance(leaf, bool | int | float | torch.dtype | torch.device):
            raise CaptureError(
                describe(f"{where} is neither a tensor nor a number", got=f"{type(leaf).__name__} {leaf!r}"[:200])
            )


def _check_parameters(model: torch.nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        broken = int(tensor.detach().isnan().sum()) if tensor.is_floating_point() and not tensor.is_meta else 0
        if broken:
            kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            raise CaptureError(
                describe(
                    f"{kind} {name!r} holds NaN, so that no rewrite of the model can be judged",
                    got=f"{broken} of {tensor.numel()} elements of {shape_text(tensor)}",
                    try_="load a checkpoint from before the training diverged",
                )
            )


def _traced(
    model: torch.nn.Module,
    samples: tuple[Sample, ...],
    dynamic_shapes: Any,
    modes: str,
    *,
    size_one_branches: bool,
) -> tuple[CapturedModule, bool]:
    """Return the graph, and whether operators were traced as for sizes above 1."""
    found = trace(model, samples[0], dynamic_shapes, size_one_branches=size_one_branches)
    tensors = _tensors_of(model)
    reason, valid = "", "both"
    if found.training:
        here, there = ("train", "eval") if model.training else ("eval", "train")
        valid = here
        if modes == "current":
            reason = "it was captured with modes='current'"
        else:
            try:
                with switched(model, not model.training):
                    other = trace(model, samples[0], dynamic_shapes, size_one_branches=size_one_branches)
                _merge(found, other, tensors, first_trains=model.training)
                valid, found.any_sizes = "both", found.any_sizes or other.any_sizes
            except (CaptureError, Unmergeable) as error:
                reason = f"tracing it in {there} mode gave: {error}"
    found.graph = fold_regions(found.graph, found.root, found.sites)
    gm = _assemble(found, tensors, samples, persistent=set(model.state_dict()))
    gm.modes, gm.modes_reason = valid, reason  # type: ignore[assignment]  # one of the three texts, by its origin
    gm.training = model.training
    return gm, found.any_sizes


@contextlib.contextmanager
def switched(model: torch.nn.Module, training: bool) -> Iterator[None]:
    """Put a model into a mode, and each of its modules back into that it was in."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _merge(first: Trace, second: Trace, tensors: dict[str, torch.Tensor], *, first_trains: bool) -> None:
    """Make ``first.graph`` hold both modes; constants that only the second trace has get names of their own."""
    if _inner_graphs(first) != _inner_graphs(second):
        raise Unmergeable("the graphs that operators of torch run (map, scan) differ between the modes")
    same: dict[str, str] = {}
    for name, constant in second.constants.items():
        twin = next((n for n, t in first.constants.items() if t is constant or _identical(t, constant)), None)
        if twin is None:
            twin = name
            while twin in first.constants or twin in tensors:
                twin += "_"
        same[name] = twin
    renumber_regions(first.graph, first.sites, second.graph, second.sites)
    first.graph = merge_modes(first.graph, second.graph, first_trains=first_trains, same_tensor=same)
    for name, constant in second.constants.items():
        first.constants.setdefault(same[name], constant)


def _inner_graphs(found: Trace) -> dict[str, str]:
    """Return the code of each graph that torch traced by itself, which is no part of the graph around it."""
    names = [str(node.target) for node in found.graph.nodes if node.op == "get_attr"]
    held = {name: getattr(found.root, name, None) for name in names if "." not in name}
    return {name: module.code for name, module in held.items() if isinstance(module, torch.fx.GraphModule)}


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, shared ones under each of their names, in the order of state_dict."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _assemble(
    found: Trace, tensors: dict[str, torch.Tensor], samples: tuple[Sample, ...], *, persistent: set[str]
) -> CapturedModule:
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        attach(root, name, tensor, persistent=name in persistent)
    for name, tensor in found.constants.items():
        attach(root, name, tensor, persistent=False)
    for node in found.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in tensors and str(node.target) not in found.constants:
            branch = getattr(found.root, str(node.target))
            root.add_module(str(node.target), branch)
    gm = CapturedModule(root, found.graph)
    # GraphModule copies what the graph reads, in the order of reading; the model's own order, and all of it, is wanted.
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        gm.__dict__[table] = root.__dict__[table]
    _describe_interface(gm, found, samples)
    return gm


def _describe_interface(gm: CapturedModule, found: Trace, samples: tuple[Sample, ...]) -> None:
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = dict(found.names)
    for node in placeholders:
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if not isinstance(size, int) and size.node.expr.is_Symbol:
                names.setdefault(str(size.node.expr), unused_name(f"{node.name}_{axis}", names.values()))
    gm.dims = {name: Dimension(name, symbol, *found.ranges.get(symbol, (0, None))) for symbol, name in names.items()}
    leaves = samples[0].leaves() if samples else [None] * len(placeholders)
    gm.inputs = tuple(input_spec(node, leaf, names) for node, leaf in zip(placeholders, leaves, strict=True))
    gm.output_names = output_names(gm)
    gm.samples = samples


def _from_program(program: torch.export.ExportedProgram, example_inputs: Any) -> CapturedModule:
    if example_inputs is None:
        if program.example_inputs is None:
            raise CaptureError("the exported program carries no example inputs; give example_inputs")
        samples: tuple[Sample, ...] = (Sample(*program.example_inputs),)
    else:
        samples = _samples(example_inputs)
    found = unlift(program)
    tensors = dict(program.state_dict)
    gm = _assemble(found, tensors, samples, persistent=set(tensors))
    training = [node for node in found.graph.nodes if node.op == "call_function" and _trains(node)]
    gm.modes = "train" if training else "eval"
    gm.modes_reason = "an exported program holds the mode it was exported in; capture the module itself for both"
    gm.training = bool(training)
    return gm


def _trains(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    flags = [a.name for a in schema.arguments if a.name in ("training", "train")] if schema else []
    from fxopt.args import arg

    return any(arg(node, flag) is True for flag in flags)
