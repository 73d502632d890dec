"""Ask torch.export for a model's program, in one way after the other until one takes the dynamic sizes asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxopt.any_sizes import any_sizes
from fxopt.control_flow import Undecided, operators_traced, trace_with_branches
from fxopt.control_flow.session import Site
from fxopt.dimensions import Sample, bind_arguments, named_dynamic_shapes, traceable
from fxopt.errors import CaptureError, FxoptError
from fxopt.recurrent import WholeRecurrentLayers
from fxopt.size_advice import sizes_that_work
from fxopt.size_builtins import symbolic_sizes
from fxopt.size_guards import checks_always_hold, drop_checks, guards_always_hold
from fxopt.tensors_of_scalars import TensorsOfScalars
from fxopt.trace_errors import asks_for_values, explained, refuses_sizes

__all__ = ["Exported", "exported", "quiet"]


@dataclasses.dataclass
class Exported:
    """torch's program of a model, and what it does not say.

    Attributes:
        program: As torch.export returned it.
        sites: File, line and function of each branch and loop on values that its graph marks.
        names: ``{symbol: user's name}`` of the dynamic sizes that the user gave one.
        training: Whether any module's ``training`` flag was read.
        any_sizes: Whether operators were traced as for sizes above 1, since torch would have fixed a size.
    """

    program: torch.export.ExportedProgram
    sites: dict[int, Site]
    names: dict[str, str]
    training: bool
    any_sizes: bool


def exported(
    model: torch.nn.Module, sample: Sample, dynamic_shapes: Any, *, size_one_branches: bool = False
) -> Exported:
    """Return the program of ``model`` in the mode that it is in.

    Args:
        model: To be traced.
        sample: Example inputs.
        dynamic_shapes: As :func:`fxopt.capture` takes them.
        size_one_branches: Whether what the model does apart for size 1 is a branch in the program; torch leaves
            it out.

    Raises:
        CaptureError: there is none.
    """
    arguments = bind_arguments(model.forward, sample)
    shapes = named_dynamic_shapes(dynamic_shapes, arguments)
    rewritten: set[types.CodeType] = set()
    if size_one_branches:
        return _Attempts(model, sample, shapes, rewritten).with_size_one_branches()
    try:
        return _Attempts(model, sample, shapes, rewritten).first()
    except CaptureError as error:
        if (cause := _refusal_of_sizes(error)) is None:
            raise

        def refusal(others: Any) -> str | None:
            try:
                _Attempts(model, sample, others, rewritten).first()
            except CaptureError as again:
                return str(again.__cause__)
            return None

        raise explained(cause, sizes_that_work(str(cause), shapes, arguments, refusal)) from cause


def _refusal_of_sizes(error: CaptureError) -> BaseException | None:
    """Return the error of torch behind another one if dynamic sizes are what it is about."""
    return error.__cause__ if error.__cause__ is not None and refuses_sizes(error.__cause__) else None


class _Attempts:
    """Ways to trace one model for some dynamic sizes.

    Args:
        model: In the mode that it is in.
        sample: Example inputs.
        shapes: Dynamic shapes with ``Dim`` objects, by parameter.
        rewritten: The functions that were found to ask for values; found again they cost a trace each.
    """

    def __init__(
        self, model: torch.nn.Module, sample: Sample, shapes: dict[str, Any] | None, rewritten: set[types.CodeType]
    ) -> None:
        self._model, self._shapes, self._rewritten = model, shapes, rewritten
        self._sample = traceable(sample, bind_arguments(model.forward, sample), shapes)
        self._arguments = bind_arguments(model.forward, self._sample)

    def first(self) -> Exported:
        """Trace, and if sizes are refused again: with symbols where Python asks for numbers, and without vain guards.

        Raises:
            CaptureError: no way takes the model with these sizes; it tells of the last way that they were too much for.
        """
        try:
            return self._traced()
        except CaptureError as error:
            if _refusal_of_sizes(error) is None:
                raise
            first = error
        with symbolic_sizes():
            try:
                with any_sizes():
                    return self._traced(any_size=True)
            except CaptureError as error:
                last = error
            try:
                return self._traced()
            except CaptureError as error:
                left = error
            guards = str(left.__cause__)
            if self._shapes is not None and guards_always_hold(guards, self._shapes, self._arguments):
                with contextlib.suppress(CaptureError):
                    return self._traced(checked=True)
        raise next(told for told in (last, left, first) if _refusal_of_sizes(told))

    def with_size_one_branches(self) -> Exported:
        """Trace for any sizes, where what the model asks whether a size is 1 is a branch.

        Raises:
            CaptureError: the model cannot be traced so.
        """
        with symbolic_sizes(), any_sizes():
            return self._traced(any_size=True, size_one_branches=True)

    def _traced(self, *, checked: bool = False, any_size: bool = False, size_one_branches: bool = False) -> Exported:
        """Trace once.

        With ``checked``, the guards that torch names hold for all sizes, and it need not prove them. What it solved, it
        did not name: its assertions are computed for all sizes too. With ``any_size``, torch is asked nothing that the
        model's own code asks of sizes.
        """
        reads: list[str] = []
        sample, shapes = self._sample, self._shapes

        def program() -> torch.export.ExportedProgram:
            reads.clear()
            with quiet(), _training_reads(self._model, reads), _standing_in():
                return torch.export.export(
                    self._model,
                    sample.args,
                    dict(sample.kwargs),
                    dynamic_shapes=shapes,
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=checked,
                )

        found, sites = self._program(program, plainly=not any_size, size_one_branches=size_one_branches)
        if checked and not checks_always_hold(found):
            raise CaptureError("a guard on sizes, which torch could not prove, does not hold for some size")
        if checked:
            drop_checks(found)
        return Exported(found, sites, _asked_names(shapes, found, self._arguments), bool(reads), any_size)

    def _program(
        self, program: Callable[[], torch.export.ExportedProgram], *, plainly: bool, size_one_branches: bool
    ) -> tuple[torch.export.ExportedProgram, dict[int, Site]]:
        """Return the program, and its branches and loops on values, if torch cannot trace the model without them."""
        undecided = False
        try:
            if plainly:
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
                found, session = trace_with_branches(
                    self._model, program, self._rewritten, size_one_branches=size_one_branches
                )
            return found, session.sites
        except FxoptError:
            # torch traces its own operators where the sides yield other sizes, for one.
            alone = _traced_by_torch(program) if undecided else None
            if alone is None:
                raise
            return alone, {}
        except Exception as error:
            raise explained(error) from error


def _traced_by_torch(program: Callable[[], torch.export.ExportedProgram]) -> torch.export.ExportedProgram | None:
    try:
        return program()
    except Exception:  # the refusal that led here says more
        return None


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
def _standing_in() -> Iterator[None]:
    """Keep recurrent layers whole and numbers in the graph, and torch's fused kernels of transformers out of it.

    The kernels exist in one mode only.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with WholeRecurrentLayers(), TensorsOfScalars():
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
