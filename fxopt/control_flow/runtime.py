"""What a rewritten function calls, by the name ``__fxopt__``: every branch, loop and question goes through here.

On Python values each of these does what the statement or builtin that it stands for does.
"""

from fxopt.control_flow.branches import (
    and_,
    assert_,
    if_,
    if_expression,
    not_,
    or_,
    raised,
    truth_and_,
    truth_or_,
)
from fxopt.control_flow.calls import call, invoke
from fxopt.control_flow.growing import append
from fxopt.control_flow.iteration import for_
from fxopt.control_flow.loops import while_
from fxopt.control_flow.state import State, peek
from fxopt.control_flow.values import UNDEFINED

__all__ = [
    "UNDEFINED", "State", "and_", "append", "assert_", "call", "for_", "if_", "if_expression", "invoke", "not_", "or_",
    "peek", "raised", "truth_and_", "truth_or_", "while_",
]  # fmt: skip
