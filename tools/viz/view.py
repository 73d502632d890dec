"""The front door of pictures: from whatever holds a graph to a file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

import fxopt
from fxopt.errors import FxoptError, describe
from fxopt.export import OnnxFile
from fxopt.export.files import check_target
from fxopt.tools.viz.document import Stage, document
from fxopt.tools.viz.dot import dot_text, svg_text
from fxopt.tools.viz.from_fx import WeightCache, fx_graph, reasons_of
from fxopt.tools.viz.from_onnx import onnx_graph
from fxopt.tools.viz.overlays import read_overlays, with_overlays
from fxopt.tools.viz.web_page import html_text

__all__ = ["FORMATS", "view"]

FORMATS = (".html", ".svg", ".dot", ".json")


def view(
    model: Any,
    path: str | os.PathLike[str] = "graph.html",
    *,
    against: Any = None,
    overlays: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write a picture of a graph; see :func:`fxopt.view`."""
    target = check_target(path)
    if target.suffix not in FORMATS:
        raise ValueError(describe(f"cannot tell the format of {target}", wanted=" or ".join(FORMATS)))
    known: WeightCache = {}
    stages = _stages(model, known)
    if against is not None:
        stages = [_stages(against, known)[-1], stages[-1]]
        stages = [
            dataclasses.replace(stage, label=f"{when}: {stage.label}")
            for when, stage in zip(("before", "after"), stages, strict=True)
        ]
    given = read_overlays(overlays)
    last = with_overlays(stages[-1].graph, given)  # what was measured belongs to the graph as it is now
    stages[-1] = dataclasses.replace(stages[-1], graph=last)
    name = title if title is not None else last.title or "graph"
    if target.suffix == ".dot":
        text = dot_text(last)
    elif target.suffix == ".svg":
        text = svg_text(last)
    else:
        content = document(stages, name, given)
        text = html_text(content) if target.suffix == ".html" else json.dumps(content, allow_nan=False)
    target.write_text(text, encoding="utf-8")
    return target


def _stages(model: Any, known: WeightCache) -> list[Stage]:
    """Return the steps that a model tells of, the last one what it is now."""
    if isinstance(model, fxopt.CapturedModule) and model.report is not None and model.report.graphs:
        return _steps(model.report, known, model)
    if isinstance(model, fxopt.Report):
        if not model.graphs:
            raise FxoptError(
                describe("the report holds no graphs", try_="fxopt.optimize(..., keep_graphs=True), or view the graph")
            )
        return _steps(model, known, None)
    if isinstance(model, torch.fx.GraphModule):
        return [Stage(fx_graph(model, known=known, title=_class_name(model)), "graph")]
    if isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        raise TypeError(
            describe(f"{type(model).__name__} is not a graph yet", try_="fxopt.view(fxopt.capture(model, inputs))")
        )
    return [Stage(onnx_graph(_onnx_model(model), title=_file_name(model)), _file_name(model))]


def _steps(report: fxopt.Report, known: WeightCache, final: fxopt.CapturedModule | None) -> list[Stage]:
    reasons = reasons_of(report)
    first, *later = report.graphs
    if final is not None and later:
        later[-1] = final  # it may have been trained since
    graph, seen = fx_graph(first, reasons=reasons, known=known), first
    stages = [Stage(graph, "captured", f"{len(first.graph.nodes)} nodes")]
    for step, gm in zip(report.steps, later, strict=True):
        texts = [f"{len(step.changes)} changes" if step.changes else step.status, *step.notes]
        if gm is not seen:  # a pass that changes nothing hands on the graph itself
            graph, seen = fx_graph(gm, reasons=reasons, known=known), gm
        own = {change.node: change.why for change in step.changes}
        stages.append(Stage(graph, step.name, "; ".join(texts), own))
    return stages


def _onnx_model(model: Any) -> Any:
    if isinstance(model, OnnxFile | ir.Model | bytes | str | os.PathLike):
        return model
    if hasattr(model, "SerializeToString"):  # an onnx.ModelProto, which has no type stubs
        return ir.from_proto(model)
    raise TypeError(
        describe(
            f"there is no picture of a {type(model).__name__}",
            wanted="a GraphModule, a report, or an ONNX model: file, bytes or ModelProto",
        )
    )


def _class_name(gm: torch.fx.GraphModule) -> str:
    """Return the name of the model that a graph was traced from, as far as it has kept it."""
    name = type(gm).__name__
    return "graph" if name in ("CapturedModule", "GraphModule", "LiveGraph") else name


def _file_name(model: Any) -> str:
    path = model.path if isinstance(model, OnnxFile) else model if isinstance(model, str | os.PathLike) else None
    return "ONNX model" if path is None else Path(path).name
