"""Trace a model whose Python code branches on values: rewrite the functions that do, and only those."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxopt.control_flow import calls, runtime
from fxopt.control_flow.arguments import call_with_numbers, holds_numbers
from fxopt.control_flow.convert import RUNTIME, converted_code
from fxopt.control_flow.growing import Rows
from fxopt.control_flow.heap import Heap
from fxopt.control_flow.identity import may_hand_back, twins
from fxopt.control_flow.indexing import get_item, holds_number, set_item
from fxopt.control_flow.jumps import Unsupported
from fxopt.control_flow.questions import asking, is_traced, known_truth
from fxopt.control_flow.scalars import TracedNumber, Undecided, UndecidedRows, as_number
from fxopt.control_flow.session import Raised, Session, refusal, running, session
from fxopt.control_flow.source import NoSource, asking_frame, definition, functions_of, is_library
from fxopt.errors import CaptureError

__all__ = ["trace_with_branches"]

Result = TypeVar("Result")
_MOST_REWRITTEN = 200


def trace_with_branches(
    model: torch.nn.Module,
    run: Callable[[], Result],
    known: set[types.CodeType],
    *,
    size_one_branches: bool = False,
) -> tuple[Result, Session]:
    """Return what ``run`` returns, which traces ``model``, and the branches and loops that the trace holds.

    Args:
        model: Whose functions may be rewritten.
        run: Traces it; called again each time that a function asks for a value.
        known: The functions that earlier traces found to; those that this one finds are added.
        size_one_branches: Whether what the model does apart for size 1 becomes a branch.

    Raises:
        CaptureError: a branch or loop on values that no graph can hold; the message names its line.
    """
    rewritten = _Rewritten()
    modules = list(model.modules())
    try:
        rewritten.add_known(known)
        while True:
            current = Session(modules, rewritten.unrolled, size_one_branches=size_one_branches)
            state = Heap([], [], modules)
            try:
                with running(current), _values_asked(), _plain_results(model):
                    return run(), current
            except Undecided as asked:
                rewritten.add(asked)
            except TypeError as error:
                if not any(kind.__name__ in str(error) for kind in (TracedNumber, Rows)):
                    raise
                # torch's own functions tell such a number from a plain one; a rewritten function hands them what fits.
                rewritten.add(Undecided("a plain number or list").with_traceback(error.__traceback__))
            except Raised as raised:
                raise raised.error from None
            finally:
                state.restore()
    finally:
        known |= rewritten.codes
        rewritten.undo()


class _Rewritten:
    """The functions whose code is replaced for the time of a trace."""

    def __init__(self) -> None:
        self.kept: list[tuple[types.FunctionType, types.CodeType]] = []
        self.codes: set[types.CodeType] = set()
        self.made: set[types.CodeType] = set()
        self.unrolled: set[types.CodeType] = set()
        self.globals: list[dict[str, Any]] = []

    def add_known(self, codes: set[types.CodeType]) -> None:
        """Rewrite the functions that have these codes, which could be rewritten before."""
        for code in codes:
            if functions := functions_of(code):
                self._replace(code, functions, (code.co_filename, code.co_firstlineno, code.co_name))

    def add(self, asked: Undecided) -> None:
        """Rewrite the function in which Python asked for a value.

        Raises:
            CaptureError: it cannot be rewritten, or it is already and asks all the same.
        """
        frames = list(_frames(asked))
        if not frames:
            raise asked
        at = (frames[0][0].co_filename, frames[0][1], frames[0][0].co_name)
        for code, _ in frames:
            if code in self.made:
                break
            if code not in self.codes and (functions := functions_of(code)) and len(self.codes) < _MOST_REWRITTEN:
                try:
                    self._replace(code, functions, at)
                except CaptureError:
                    if self._unrolls(asked, frames[0][0]):
                        return
                    raise
                return
            if code not in self.codes:
                break
            # A function made anew at each call: the one that makes it is the one to rewrite.
        if self._unrolls(asked, frames[0][0]):
            return
        raise refusal(
            f"Python asks for {asked.what} in a place that cannot be rewritten",
            at,
            try_="an if statement, a while loop or torch.where there, "
            "instead of a comprehension's condition or a call that wants a plain number",
        )

    def _unrolls(self, asked: Undecided, code: types.CodeType) -> bool:
        """Return whether torch may be left to fix how many rows there are, which it is then for this code."""
        if not isinstance(asked, UndecidedRows) or code in self.unrolled:
            return False
        self.unrolled.add(code)
        return True

    def _replace(self, code: types.CodeType, functions: list[types.FunctionType], at: tuple[str, int, str]) -> None:
        try:
            new = converted_code(definition(code), code)
        except Unsupported as unsupported:
            raise refusal(
                f"a function that branches on the value of a tensor holds {unsupported}",
                (at[0], unsupported.line or at[1], at[2]),
                try_="a plain if, while or for statement",
            ) from None
        except NoSource as missing:
            raise refusal(
                f"a function branches on the value of a tensor, and cannot be rewritten: {missing}",
                at,
                try_="the function in a file of its own, or torch.where, or torch.cond",
            ) from None
        self.codes.add(code)
        self.made.update(_with_inner(new))
        for function in functions:
            self.kept.append((function, code))
            function.__code__ = new
            if RUNTIME not in function.__globals__:
                function.__globals__[RUNTIME] = runtime
                self.globals.append(function.__globals__)

    def undo(self) -> None:
        """Give every function its own code back."""
        for function, code in self.kept:
            function.__code__ = code
        for table in self.globals:
            table.pop(RUNTIME, None)


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of the functions that it makes."""
    yield code
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from _with_inner(item)


def _frames(asked: Undecided) -> Iterator[tuple[types.CodeType, int]]:
    """Yield the user's functions on the stack when a value was asked for, the innermost first."""
    trace = asked.__traceback__
    found: list[tuple[types.CodeType, int]] = []
    while trace is not None:
        frame = asking_frame(trace.tb_frame)
        if frame is trace.tb_frame:
            found.append((frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    yield from reversed(found)


@contextlib.contextmanager
def _values_asked() -> Iterator[None]:
    """Answer questions for values with numbers that stay in the graph, and refuse to guess the truth of one."""
    kept: dict[Any, Any] = {cls: cls.__bool__ for cls in (torch.SymBool, torch.SymInt)}
    index = torch.SymInt.__index__

    for cls, truth in kept.items():
        cls.__bool__ = asking(truth, "the truth of a condition on a dynamic size", known=known_truth)
    setattr(torch.SymInt, "__index__", asking(index, "a dynamic size as a plain int"))  # noqa: B010  (mypy forbids the assignment that this is)
    try:
        with _ValuesAsked():
            yield
    finally:
        setattr(torch.SymInt, "__index__", index)  # noqa: B010  (as above)
        for cls, method in kept.items():
            cls.__bool__ = method


@contextlib.contextmanager
def _plain_results(model: torch.nn.Module) -> Iterator[None]:
    """Let the model return plain numbers, as it does in eager."""

    def plain(_: torch.nn.Module, __: Any, result: Any) -> Any:
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Rows):
                leaf.other()
        return pytree.tree_map_only(TracedNumber, TracedNumber.symbolic, result)

    hook = model.register_forward_hook(plain)
    try:
        yield
    finally:
        hook.remove()


_ASKING = {
    torch.Tensor.__bool__: "the truth of a tensor",
    torch.Tensor.__int__: "a tensor as an int",
    torch.Tensor.__float__: "a tensor as a float",
    torch.Tensor.__index__: "a tensor as an index",
}


class _ValuesAsked(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        caller = _caller()
        if _goes_through_rows(caller) and is_traced(args[0].shape[0]):
            raise UndecidedRows("the rows of a tensor of dynamic size one by one")
        if not is_library(caller.f_code):
            if func in _ASKING:
                raise Undecided(_ASKING[func])
            if func is torch.Tensor.item:
                number = as_number(args[0])
                return number.symbolic() if _is_for_index() else number
            if name in _ANSWERS:
                return TracedNumber(_ANSWERS[name](*args, **kwargs))
        if name == "__getitem__" and holds_number(args[1]):
            return get_item(*args)
        if name == "__setitem__" and (holds_number(args[1]) or isinstance(args[2], TracedNumber)):
            return set_item(*args)
        if may_hand_back(name, args, kwargs):
            args, kwargs = twins((args, kwargs))
        return call_with_numbers(func, args, kwargs) if holds_numbers((args, kwargs)) else func(*args, **kwargs)


_ANSWERS: dict[str, Callable[..., torch.Tensor]] = {
    "allclose": lambda *args, **kwargs: torch.isclose(*args, **kwargs).all(),
    "equal": lambda a, b: (a == b).all() if a.shape == b.shape else torch.full((), False),
    "is_nonzero": lambda value: as_number(value).as_kind(bool).tensor,
}


def _goes_through_rows(caller: types.FrameType) -> bool:
    """Return whether the user's code goes through a tensor, where it has not been found that no loop can stand."""
    if caller.f_code is not torch.Tensor.__iter__.__code__ or caller.f_back is None:
        return False
    frame = asking_frame(caller.f_back)
    return frame is not None and frame.f_code not in session().unrolled


def _is_for_index() -> bool:
    """Return whether torch.export asks for the value of a position in an index, for an operator that takes a size."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "maybe_tensor_index_item"


def _caller() -> types.FrameType:
    """Return the frame that called the function which is being intercepted."""
    from torch._export import non_strict_utils  # with torch's compiler, which takes seconds to load: not on import

    frame = sys._getframe(2)
    # Rewritten code calls by way of fxopt. Other modes stand between: torch.export has one inside this one, and fake
    # tensors take tolist() apart.
    while frame.f_back is not None and (
        frame.f_code.co_filename in (non_strict_utils.__file__, calls.__file__)
        or frame.f_code.co_name in ("__torch_function__", "tolist")
        or (frame.f_code.co_name == "<listcomp>" and frame.f_back.f_code.co_name == "tolist")
    ):
        frame = frame.f_back
    return frame
