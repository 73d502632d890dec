"""The captured graph as a module: what every pass works on and every user gets back."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils import _pytree as pytree

from fxopt.args import argument_positions, shape_text, size_text
from fxopt.dimensions import Dimension, Sample, resize
from fxopt.eager_control_flow import holds_traced
from fxopt.errors import InputError, InvariantError, ModeError, describe
from fxopt.live_graph import LiveGraph, graph_class, refuse_sharded

if TYPE_CHECKING:
    from fxopt.report import Report

__all__ = ["CapturedModule", "InputSpec", "Provenance", "graph_modules"]

Modes = Literal["both", "train", "eval"]


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One leaf of the model's inputs.

    Attributes:
        name: Name of the placeholder, and of the ONNX input.
        dtype: Element type of a tensor; None for a number, which the graph holds as a constant.
        shape: Sizes of a tensor: an integer, or the text of a dynamic size (``"batch"``, ``"2*seq"``).
        constant: The number that the graph was captured with, if it is not a tensor.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int | str, ...] = ()
    constant: Any = None

    @property
    def is_tensor(self) -> bool:
        """Whether this input is a tensor."""
        return self.dtype is not None

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{self.name}: {self.constant!r}"
        kind = shape_text(torch.empty(0, dtype=self.dtype)).split("[")[0]
        return f"{self.name}: {kind}[{', '.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which pass made a node, from which nodes. Found in ``node.meta["fxopt"]``."""

    pass_name: str
    sources: tuple[str, ...] = ()


class CapturedModule(LiveGraph):
    """A model as one functional ATen graph: call it, train it, print it, copy it, save it.

    Made by :func:`fxopt.capture`; parameters and buffers keep the names they had in the model. Both modes live in the
    graph: ``train()`` and ``eval()`` set the arguments that depend on the mode, each recorded in ``node.meta["modes"]``
    as ``{argument: (while training, otherwise)}``.

    Attributes:
        inputs: The leaves of the inputs, in the order of the placeholders.
        output_names: A name for each tensor or number that the graph returns.
        dims: The dynamic sizes by name.
        samples: The example inputs.
        calibration: Inputs that passes may measure on, as the user gave them; not saved with the graph.
        modes: ``"both"``, or the one mode that the graph is valid in.
        report: What the passes did.
        records: What passes leave for later ones, by the name of the pass: plain JSON values, saved with the graph.
            Under ``"passes"`` stand those that changed the graph, in order.
    """

    inputs: tuple[InputSpec, ...]
    output_names: tuple[str, ...]
    dims: dict[str, Dimension]
    samples: tuple[Sample, ...]
    calibration: Any
    modes: Modes
    modes_reason: str
    report: Report | None
    records: dict[str, Any]

    def __init__(self, root: torch.nn.Module, graph: torch.fx.Graph, class_name: str = "CapturedModule") -> None:
        super().__init__(root, graph, class_name)
        self.inputs, self.output_names, self.dims, self.samples = (), (), {}, ()
        self.calibration = None
        self.modes, self.modes_reason, self.report = "both", "", None
        self.records = {}
        self.register_forward_pre_hook(_check_inputs, with_kwargs=True)

    @property
    def symbol_names(self) -> dict[str, str]:
        """The user's name of each symbolic size: ``{"s77": "batch"}``."""
        return {dimension.symbol: dimension.name for dimension in self.dims.values()}

    def train(self, mode: bool = True) -> CapturedModule:
        """Set every mode-dependent argument for training (or evaluation) and return self.

        Raises:
            ModeError: the graph was captured for the other mode only.
        """
        self._set_mode(mode)
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        # Not in train() alone: Lightning goes back to training after a validation by setting `training`.
        if name == "training" and "_graph" in self.__dict__ and value != self.__dict__["training"]:
            self._set_mode(value)
        super().__setattr__(name, value)

    def _set_mode(self, mode: bool) -> None:
        modes = self.__dict__.get("modes", "both")
        if modes != "both" and mode != (modes == "train"):
            raise ModeError(
                describe(
                    f"this graph is valid in {modes} mode only, "
                    f"and cannot be switched to {'train' if mode else 'eval'} mode",
                    because=self.modes_reason,
                    try_=f"capture the model again after model.{'train' if mode else 'eval'}()",
                )
            )
        for module in graph_modules(self):
            if sum(  # not any(): each is to be set
                set_mode(node, mode) for node in module.graph.nodes if "modes" in node.meta
            ):
                module.recompile()

    def clone(self, *, copy_tensors: bool = False) -> CapturedModule:
        """Return a copy with a graph of its own; tensors are shared unless ``copy_tensors``.

        The copy costs no code generation: a graph and its copy run the same code.

        Raises:
            PassError: FSDP has split the parameters among processes.
        """
        refuse_sharded(self, "copied")
        memo: dict[int, Any] = {}
        with _collector_paused():
            return _clone(self, memo, copy_tensors)  # type: ignore[no-any-return]  # _clone returns what it is given

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        refuse_sharded(self, "copied")
        with _collector_paused():
            return _clone(self, memo, copy_tensors=True)  # type: ignore[no-any-return]  # _clone returns what it is given

    def __reduce__(self) -> Any:
        from fxopt.serialize import from_bytes, to_bytes

        return from_bytes, (to_bytes(self),)

    def flatten_inputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the leaves of the arguments in the order of the placeholders.

        Raises:
            InputError: structure, dtype or shape differ from what the graph was captured for.
        """
        return check_leaves(self, self._leaves(args, kwargs))

    def flat_outputs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run the graph and return the leaves of its outputs, constants and None included."""
        return tuple(pytree.tree_leaves(self(*args, **kwargs), is_leaf=lambda leaf: leaf is None))

    def resized(self, sizes: Mapping[str, int], sample: Sample | None = None) -> Sample:
        """Return a sample (the first, if not given) with other dynamic sizes, ``{"batch": 3}``.

        Sizes not named stay as they are. Slices are repeated or cut, so that indices and masks stay legal.
        """
        sample = self.samples[0] if sample is None else sample
        leaves = self.flatten_inputs(*sample.args, **sample.kwargs)
        now = self.sizes_of(leaves) | dict(sizes)
        resized = [
            resize(leaf, {axis: size_of(size, now) for axis, size in enumerate(spec.shape) if isinstance(size, str)})
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf, spec in zip(leaves, self.inputs, strict=True)
        ]
        return sample.with_leaves(resized)

    def sizes_of(self, leaves: list[Any]) -> dict[str, int]:
        """Return the value that each dynamic size has in these input leaves."""
        found: dict[str, int] = {}
        for leaf, spec in zip(leaves, self.inputs, strict=True):
            for axis, size in enumerate(spec.shape):
                if isinstance(size, str) and size in self.dims:
                    found.setdefault(size, int(leaf.shape[axis]))
        return found

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        spec = self.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]  # torch declares the base class only
        names = self.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]  # torch declares the base class only
        positional, keywords = spec.children()
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        if len(args) > len(names) or set(given) != set(names) or len(args) + len(kwargs) != len(given):
            raise InputError(
                describe(
                    "the graph is called with other arguments than it was captured with",
                    got=f"{len(args)} positional, keywords {', '.join(kwargs) or '(none)'}",
                    wanted=", ".join(names) or "(no arguments)",
                )
            )
        keys = names[positional.num_children :]
        ordered = (tuple(given[name] for name in names[: positional.num_children]), {key: given[key] for key in keys})
        leaves, structure = pytree.tree_flatten(ordered)
        if structure.num_leaves != spec.num_leaves or len(keys) != keywords.num_children:
            raise InputError(describe("the inputs have another structure than at capture", got=structure, wanted=spec))
        return leaves


def graph_modules(root: torch.nn.Module) -> Iterator[torch.fx.GraphModule]:
    """Yield the graph and the graphs inside it: the branches and bodies of control flow."""
    for module in root.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield module


def set_mode(node: torch.fx.Node, training: bool) -> bool:
    """Set the node's mode-dependent arguments; return whether one changed."""
    changed = False
    for name, (while_training, otherwise) in node.meta["modes"].items():
        wanted = while_training if training else otherwise
        position = argument_positions(node.target)[name][0]
        if position is not None and position < len(node.args):
            if node.args[position] != wanted:
                node.update_arg(position, wanted)
                changed = True
        elif node.kwargs.get(name) != wanted:
            node.update_kwarg(name, wanted)
            changed = True
    return changed


def size_of(text: str, sizes: Mapping[str, int]) -> int:
    """Return the value of a dynamic size, a name or an expression of names, given the value of each name.

    Raises:
        InvariantError: the expression does not become an integer.
    """
    if text in sizes:
        return sizes[text]
    import sympy
    from torch.utils._sympy import functions

    known = {name: getattr(functions, name) for name in functions.__all__}
    found = sympy.sympify(text, locals=known | {name: sympy.Integer(size) for name, size in sizes.items()})
    if not found.is_Integer:
        raise InvariantError(f"size {text!r} has no value given {dict(sizes)}")
    return int(found)


def check_leaves(gm: CapturedModule, leaves: list[Any]) -> list[Any]:
    """Return the input leaves, checked against what the graph was captured for.

    Raises:
        InputError: one does not fit; the message names it.
    """
    if len(leaves) != len(gm.inputs):
        raise InputError(f"the graph takes {len(gm.inputs)} inputs and got {len(leaves)}")
    sizes: dict[str, tuple[int, str]] = {}
    for leaf, spec in zip(leaves, gm.inputs, strict=True):
        problem = _leaf_problem(gm, leaf, spec, sizes)
        if problem:
            got = shape_text(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)
            raise InputError(
                describe(
                    f"input {spec.name!r} does not fit the captured graph: {problem}",
                    got=got,
                    wanted=str(spec).split(": ", 1)[1],
                )
            )
    return leaves


def _leaf_problem(gm: CapturedModule, leaf: Any, spec: InputSpec, sizes: dict[str, tuple[int, str]]) -> str | None:
    if not spec.is_tensor:
        same = type(leaf) is type(spec.constant) and leaf == spec.constant
        return None if same or leaf is spec.constant else "the value is a constant of the graph"
    if not isinstance(leaf, torch.Tensor):
        return f"a {type(leaf).__name__} is not a tensor"
    if leaf.dtype != spec.dtype:
        return "another element type"
    if leaf.ndim != len(spec.shape):
        return f"rank {leaf.ndim} instead of {len(spec.shape)}"
    for axis, (size, wanted) in enumerate(zip(leaf.shape, spec.shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                return f"size {size} instead of {wanted} along axis {axis}"
        elif wanted in gm.dims:
            known, where = sizes.setdefault(wanted, (int(size), spec.name))
            if known != size:
                return f"{wanted} is {known} in {where!r} and {size} here"
            if not gm.dims[wanted].allows(int(size)):
                return f"{wanted} = {size} is outside {gm.dims[wanted]}"
    return None


def _check_inputs(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling() and not holds_traced(args):
        module.flatten_inputs(*args, **kwargs)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Make many objects that all stay: looking for garbage among them meanwhile takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clone(module: Any, memo: dict[int, Any], copy_tensors: bool) -> Any:
    """Return a copy of a module tree of graphs and plain containers, with graphs of its own."""
    if id(module) in memo:
        return memo[id(module)]
    if type(module) is not torch.nn.Module and not isinstance(module, torch.fx.GraphModule):
        raise InvariantError(f"a captured graph holds a {type(module).__name__}, not a graph or a plain container")
    cls: Any = graph_class(module).__mro__[1] if isinstance(module, torch.fx.GraphModule) else torch.nn.Module
    new = cls.__new__(cls)
    memo[id(module)] = new
    new.__dict__.update(
        {
            # Copying a loader may read it, and what it loads is the user's.
            key: copy.copy(item) if isinstance(item, dict | list | set) and key != "calibration" else item
            for key, item in module.__dict__.items()
            if key not in ("_graph", "_modules")
        }
    )
    for key in ("_parameters", "_buffers"):
        new.__dict__[key] = {name: _clone_tensor(t, memo, copy_tensors) for name, t in module.__dict__[key].items()}
    new.__dict__["_modules"] = {name: _clone(child, memo, copy_tensors) for name, child in module._modules.items()}
    if isinstance(module, torch.fx.GraphModule):
        new.__dict__["_graph"] = copy_graph(module.graph, new)
        type(new).forward = graph_class(module).forward
    return new


def _clone_tensor(tensor: torch.Tensor | None, memo: dict[int, Any], copy_tensors: bool) -> torch.Tensor | None:
    if tensor is None or not copy_tensors:
        return tensor
    return copy.deepcopy(tensor, memo)


def copy_graph(graph: torch.fx.Graph, owner: torch.fx.GraphModule) -> torch.fx.Graph:
    """Return a copy of ``graph`` whose nodes have the same names and metadata dictionaries of their own."""
    new = torch.fx.Graph(owning_module=owner, tracer_cls=graph._tracer_cls)
    twins: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            twin = new.create_node("output", "output", _map(node.args, twins), {}, node.name, node.type)
            twin.meta = dict(node.meta)
        else:
            twin = new.node_copy(node, lambda old: twins[old])
            if twin.name != node.name:
                raise InvariantError(f"node {node.name} is renamed to {twin.name} by copying")
        twins[node] = twin
    new.set_codegen(graph._codegen)
    return new


def _map(args: Any, twins: Mapping[torch.fx.Node, torch.fx.Node]) -> Any:
    return torch.fx.map_arg(args, lambda old: twins[old])


__all__ += ["check_leaves", "copy_graph", "set_mode", "size_of", "size_text"]
