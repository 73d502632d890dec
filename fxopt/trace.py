"""Trace a module with torch.export and hand out a clean functional ATen graph.

Clean means: no in-place op, no metadata assertion or guard call, gradient-mode regions inlined, constants that the
trace copies before use read directly, recurrent layers whole whatever the length of the sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxopt.control_flow import Undecided, drop_trials, operators_traced, trace_with_branches
from fxopt.control_flow.session import Site
from fxopt.dimensions import Sample, bind_arguments, named_dynamic_shapes, traceable
from fxopt.errors import CaptureError, FxoptError, describe
from fxopt.functionalize import fake_call, functionalize
from fxopt.grouped_ops import as_grouped_mm
from fxopt.recurrent import RECURRENT_OPERATORS, WholeRecurrentLayers
from fxopt.size_advice import sizes_that_work
from fxopt.size_builtins import symbolic_sizes
from fxopt.size_guards import checks_always_hold, drop_checks, guards_always_hold
from fxopt.tensors_of_scalars import TensorsOfScalars
from fxopt.trace_errors import asks_for_values, explained, refuses_sizes

__all__ = ["Trace", "trace", "unlift"]

aten = torch.ops.aten


@dataclasses.dataclass
class Trace:
    """A clean graph, the tensors it reads, and what is known of its dynamic sizes.

    Attributes:
        graph: Functional ATen graph; its attribute names are those of the model.
        root: Module that holds every attribute that the graph reads, and the graphs of control flow.
        constants: Tensors that are neither parameter nor buffer of the model, by attribute name.
        ranges: ``{symbol: (min, max or None)}`` of the dynamic sizes.
        names: ``{symbol: user's name}`` where the user gave one.
        training: Whether any module's ``training`` flag was read.
        sites: File, line and function of each branch and loop on values that the graph marks.
    """

    graph: torch.fx.Graph
    root: torch.fx.GraphModule
    constants: dict[str, torch.Tensor]
    ranges: dict[str, tuple[int, int | None]]
    names: dict[str, str]
    training: bool = False
    sites: dict[int, Site] = dataclasses.field(default_factory=dict)


def trace(model: torch.nn.Module, sample: Sample, dynamic_shapes: Any) -> Trace:
    """Trace ``model`` in the mode that it is in.

    Raises:
        CaptureError: the model cannot become one graph; the message names the user's line and the reason, and the
            dynamic sizes that do work if those asked for do not.
    """
    arguments = bind_arguments(model.forward, sample)
    shapes = named_dynamic_shapes(dynamic_shapes, arguments)
    try:
        return _traced_with_sizes(model, sample, shapes)
    except CaptureError as error:
        if (cause := _refusal_of_sizes(error)) is None:
            raise

        def refusal(others: Any) -> str | None:
            try:
                _traced_with_sizes(model, sample, others)
            except CaptureError as again:
                return str(again.__cause__)
            return None

        raise explained(cause, sizes_that_work(str(cause), shapes, arguments, refusal)) from cause


def _refusal_of_sizes(error: CaptureError) -> BaseException | None:
    """Return the error of torch behind another one if dynamic sizes are what it is about."""
    return error.__cause__ if error.__cause__ is not None and refuses_sizes(error.__cause__) else None


def _traced_with_sizes(model: torch.nn.Module, sample: Sample, shapes: dict[str, Any] | None) -> Trace:
    """Trace, and if sizes are refused once more: with symbols where Python asks for numbers, without vain guards."""
    try:
        return _traced(model, sample, shapes)
    except CaptureError as error:
        if _refusal_of_sizes(error) is None:
            raise
        first = error
    with symbolic_sizes():
        try:
            return _traced(model, sample, shapes)
        except CaptureError as error:
            left = error
        guards = str(left.__cause__)
        if shapes is not None and guards_always_hold(guards, shapes, bind_arguments(model.forward, sample)):
            with contextlib.suppress(CaptureError):
                return _traced(model, sample, shapes, checked=True)
    raise first if _refusal_of_sizes(left) is None else left


def _traced(model: torch.nn.Module, sample: Sample, shapes: dict[str, Any] | None, *, checked: bool = False) -> Trace:
    """Trace once; with ``checked``, the guards that torch names hold for all sizes, and it need not prove them.

    What it solved, it did not name: its assertions are computed for all sizes too.
    """
    arguments = bind_arguments(model.forward, sample)
    sample = traceable(sample, arguments, shapes)
    arguments = bind_arguments(model.forward, sample)
    reads: list[str] = []

    def program() -> torch.export.ExportedProgram:
        reads.clear()
        with quiet(), _training_reads(model, reads), WholeRecurrentLayers(), TensorsOfScalars(), _without_fast_path():
            return torch.export.export(
                model,
                sample.args,
                dict(sample.kwargs),
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=checked,
            )

    exported, sites = _exported(model, program)
    if checked and not checks_always_hold(exported):
        raise CaptureError("a guard on sizes, which torch could not prove, does not hold for some size")
    if checked:
        drop_checks(exported)
    found = unlift(exported, _asked_names(shapes, exported, arguments))
    found.training, found.sites = bool(reads), sites
    return found


def _exported(
    model: torch.nn.Module, program: Callable[[], torch.export.ExportedProgram]
) -> tuple[torch.export.ExportedProgram, dict[int, Site]]:
    """Return the program, and its branches and loops on values, if torch cannot trace the model without them."""
    undecided = False
    try:
        with operators_traced():
            return program(), {}
    except FxoptError:
        raise
    except Undecided:
        undecided = True
    except Exception as error:
        if not asks_for_values(error):
            raise explained(error) from error
    try:
        with operators_traced():
            exported, session = trace_with_branches(model, program)
    except FxoptError:
        # torch traces its own operators where the sides yield other sizes, for one.
        alone = _traced_by_torch(program) if undecided else None
        if alone is None:
            raise
        return alone, {}
    except Exception as error:
        raise explained(error) from error
    return exported, session.sites


def _traced_by_torch(program: Callable[[], torch.export.ExportedProgram]) -> torch.export.ExportedProgram | None:
    try:
        return program()
    except Exception:  # the refusal that led here says more
        return None


def unlift(program: torch.export.ExportedProgram, names: dict[str, str] | None = None) -> Trace:
    """Return the clean graph of an exported program, parameters and buffers as attributes."""
    root = program.module(check_guards=False)
    kinds = dict.fromkeys(program.graph_signature.parameters, "parameter")
    kinds |= dict.fromkeys(program.graph_signature.buffers, "buffer")
    ranges = {
        str(symbol): (_bound(interval.lower) or 0, _bound(interval.upper))
        for symbol, interval in program.range_constraints.items()
    }
    graph = root.graph
    _inline_regions(root)
    for node in list(graph.nodes):
        if _is_noise(node):
            graph.erase_node(node)
    drop_trials(graph)
    for module in root.modules():
        if isinstance(module, torch.fx.GraphModule) and module is not root:
            module.graph = functionalize(module.graph, {})
    graph = functionalize(graph, kinds)
    _restore_operators(graph)
    _read_constants_directly(graph)
    _drop_unread(graph)
    constants = {
        str(node.target): _attribute(root, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and str(node.target) not in kinds
    }
    constants = {name: item for name, item in constants.items() if isinstance(item, torch.Tensor)}
    return Trace(graph, root, constants, ranges, names or {})


def _bound(limit: Any) -> int | None:
    return int(limit) if limit.is_Integer and limit < 2**60 else None


def _asked_names(shapes: Any, program: torch.export.ExportedProgram, arguments: dict[str, Any]) -> dict[str, str]:
    """Return the user's name of each symbol: that of the Dim along whose axis the symbol stands."""
    if shapes is None:
        return {}
    from fxopt.dimensions import dynamic_axes

    # Leaves of the program's inputs come in the order of (args, kwargs), those of `arguments` in the signature's.
    axes_of = {id(tensor): axes for tensor, axes in dynamic_axes(arguments, shapes)}
    leaves = Sample(*program.example_inputs).leaves() if program.example_inputs else []
    by_shape = [axes_of.get(id(leaf), {}) for leaf in leaves]
    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    for user, axes in zip(users, by_shape, strict=False):
        for axis, dim in axes.items():
            size = placeholders[user].meta["val"].shape[axis]
            name = getattr(dim, "__name__", None)
            if name and not isinstance(size, int) and size.node.expr.is_Symbol:
                names.setdefault(str(size.node.expr), name)
    return names


def _is_noise(node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target) == "_guards_fn"
    return node.op == "call_function" and node.target in (aten._assert_tensor_metadata.default,)


def _inline_regions(root: torch.fx.GraphModule) -> None:
    """Replace gradient-mode and autocast regions by their bodies; a region without gradients detaches its results."""
    higher = torch.ops.higher_order
    for node in list(root.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is higher.wrap_with_set_grad_enabled:
            enabled, body, *operands = node.args
        elif node.target is higher.wrap_with_autocast:
            device, _, active, _, body, *operands = node.args
            if active:
                raise CaptureError(
                    describe(
                        f"the model runs a part under torch.autocast({device!r}), "
                        "which a graph of fixed precision cannot hold",
                        source=node.meta.get("stack_trace", "").strip().splitlines()[-1:] or None,
                        try_="capture the model without autocast, then lower the precision with a half-precision pass",
                    )
                )
            enabled = True
        else:
            continue
        inner = _attribute(root, str(body.target))
        _inline_regions(inner)
        results = _inline(root.graph, node, inner.graph, operands, detach=not enabled)
        _replace_results(root.graph, node, results)
        if not body.users:
            root.graph.erase_node(body)
            delattr(root, str(body.target))


def _inline(
    graph: torch.fx.Graph, at: torch.fx.Node, body: torch.fx.Graph, operands: list[Any], *, detach: bool
) -> Any:
    twins = dict(zip([n for n in body.nodes if n.op == "placeholder"], operands, strict=True))
    with graph.inserting_before(at):
        for node in body.nodes:
            if node.op == "output":
                results = torch.fx.map_arg(node.args[0], lambda old: twins[old])
            elif node.op != "placeholder":
                twin = twins[node] = graph.node_copy(node, lambda old: twins[old])
                twin.meta["without_gradients"] = detach
                if isinstance(twin.target, torch._ops.OpOverload):
                    # The body was traced on its own: only now do its views share memory with the values around it.
                    with torch.no_grad():
                        twin.meta["val"] = fake_call(twin.target, twin.args, twin.kwargs)
        if not detach:
            return results
        return torch.fx.map_arg(results, lambda result: _detached(graph, result))


def _detached(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Node:
    found = node.meta.get("val")
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        return node
    detached = graph.call_function(aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    detached.meta["val"] = fake_call(aten.detach.default, (node,), {})
    return detached


def _replace_results(graph: torch.fx.Graph, region: torch.fx.Node, results: Any) -> None:
    if isinstance(results, torch.fx.Node):
        region.replace_all_uses_with(results)
    else:
        for user in list(region.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(region)


def _read_constants_directly(graph: torch.fx.Graph) -> None:
    """Read a constant instead of a fresh copy of it: in a functional graph nobody can write into it."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default):
            source = node.args[0]
            for user in list(node.users):
                if user.target is aten.detach.default:
                    user.replace_all_uses_with(source)
                    graph.erase_node(user)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _restore_operators(graph: torch.fx.Graph) -> None:
    """Put ATen's operators in the place of stand-ins, and fxopt's in that of other libraries' where they are equal."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = as_grouped_mm(RECURRENT_OPERATORS.get(node.target, node.target))


def _drop_unread(graph: torch.fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        unread_size = node.op == "call_function" and node.target is aten.sym_size.int
        if not node.users and (node.op == "get_attr" or unread_size):
            graph.erase_node(node)


def _attribute(root: torch.nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export without what torch prints and warns of besides the error that it raises."""
    shapes_log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = shapes_log.level
    # On a data-dependent branch torch prints the graph so far; the error that is raised says it in a few lines.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        shapes_log.setLevel(logging.CRITICAL)
        # torch.export warns of attributes that recurrent layers assign to themselves while they are traced.
        warnings.filterwarnings("ignore", message="The tensor attributes? .* (was|were) assigned during export")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        try:
            yield
        finally:
            shapes_log.setLevel(level)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keep torch's fused inference kernels of transformer layers out of the graph: they exist in one mode only."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _training_reads(model: torch.nn.Module, reads: list[str]) -> Iterator[None]:
    """Note each time the forward of a module asks for a ``training`` flag."""
    ours = {id(module) for module in model.modules()}

    def noting(self: torch.nn.Module, name: str) -> Any:
        if name == "training" and id(self) in ours:
            reads.append(type(self).__name__)
        return object.__getattribute__(self, name)

    torch.nn.Module.__getattribute__ = noting  # type: ignore[assignment]  # it takes a module, not any object
    try:
        yield
    finally:
        del torch.nn.Module.__getattribute__
