"""Branches and loops of Python on the values of tensors: captured unmodified, as ``cond`` and ``while_loop``."""

from fxopt.control_flow.fold import drop_trials, fold_regions
from fxopt.control_flow.operators import operators_traced
from fxopt.control_flow.scalars import Undecided
from fxopt.control_flow.session import CaptureWarning
from fxopt.control_flow.tracing import trace_with_branches

__all__ = ["CaptureWarning", "Undecided", "drop_trials", "fold_regions", "operators_traced", "trace_with_branches"]
