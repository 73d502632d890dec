"""Look rows of embeddings up in tables of 8 bits: beside layers of integers, tables of floats would be most of a file.

A table is stored in blocks of 32 numbers, each with a scale and a zero point, some 46 dB from its floats. A look-up
makes floats of the rows that it needs. A table that a layer multiplies by as well, as the last layer of many language
models does, has other integers there: one scale for each row, and none for ONNX Runtime to look up.
"""

from __future__ import annotations

import dataclasses

from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.metric import Metric, measured
from fxopt.passes.quantize.matrix_uses import LOOKUPS
from fxopt.passes.quantize.placement import all_sites, patterns_fitting
from fxopt.passes.quantize.target import Target
from fxopt.passes.quantize.weight_only import TABLES
from fxopt.rewriter import Rewriter

__all__ = ["has_tables", "store_tables", "store_tables_within"]

_SHARE = 0.5  # of an accuracy budget that tables may take, so that layers find some left


def has_tables(gm: CapturedModule) -> bool:
    """Return whether a graph, or a graph inside it, looks rows up."""
    return any(node.target in LOOKUPS for module in graph_modules(gm) for node in module.graph.nodes)


def store_tables(rw: Rewriter, target: Target, skip: tuple[str, ...]) -> None:
    """Store the tables of embeddings in 8 bits, for a target that looks rows up in blocks.

    Args:
        rw: Of a graph that is prepared for quantization, before its layers are.
        target: The runtime.
        skip: Patterns of names of what stays float, as for :func:`place`.
    """
    products = {
        site.node
        for prefix, site in all_sites(rw.gm, target)
        if site.is_layer and not patterns_fitting(site.node, site.weight, skip, prefix)
    }
    dataclasses.replace(TABLES, skip=skip).store(rw, products.__contains__)


def store_tables_within(
    rw: Rewriter, floats: CapturedModule, target: Target, skip: tuple[str, ...], metric: Metric, max_drop: float
) -> None:
    """Do so if it takes at most half of an accuracy budget.

    Args:
        rw: See :func:`store_tables`.
        floats: The same graph, which stays as it is.
        target: The runtime.
        skip: Patterns of what stays float.
        metric: How good a model is; called twice if there are tables.
        max_drop: By how much it may fall.

    Raises:
        TypeError, ValueError: the metric returns no number.
    """
    trial = Rewriter(floats.clone(), rw.pass_name)
    store_tables(trial, target, skip)
    if not trial.changes:
        rw.skips += trial.skips
        return
    trial.finish()
    before = measured(metric, floats, "the float graph")
    behind = measured(metric, trial.gm, "the graph with tables in 8 bits")
    found = f"tables of embeddings in 8 bits: metric {behind:.6g} where floats have {before:.6g}"
    if behind >= before - _SHARE * max_drop:
        store_tables(rw, target, skip)
        rw.notes.append(f"{found}, kept")
    else:
        rw.notes.append(f"{found}, which is more than half of the budget: they stay floats")
