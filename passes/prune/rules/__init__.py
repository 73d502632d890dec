"""The rules: how the indices of each operator's inputs and outputs hang together, and how its arguments are cut.

One file a kind of operator. A rule is a class with three methods, registered for its operators by :func:`handles`.
"""

from __future__ import annotations

from fxopt.passes.prune.rules.base import Rule, handles, rule_for

__all__ = ["Rule", "handles", "rule_for"]
