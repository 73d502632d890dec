"""Captured graphs of any size, made without tracing: blocks in which each cleanup pass finds the same share of work.

A block of 47 nodes: reads of its parameters and buffers; convolution and batch norm, which counts its batches while
training; a convolution with a weight that all blocks share, and its batch norm; inactive dropout, a copy, a pair of
permutations; a constant expression; equal calls; a chain of clamps, a repeated relu and a factor of 1; a scaled
convolution; a hardswish that is spelled out; a value that depends on the mode; dead code. Every eighth block has a
branch of two small graphs as well.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch

import fxopt
from fxopt.attributes import attach
from fxopt.functionalize import fake_call
from fxopt.graph_module import CapturedModule
from fxopt.ops import SELECT_MODE, UPDATE_BUFFER

aten = torch.ops.aten
BLOCKS_PER_STAGE = 50
BLOCKS_PER_BRANCH = 8
CHANNELS = 2


class Seed(torch.nn.Module):
    def forward(self, x):
        return x.sigmoid()


class Builder:
    """Adds blocks to a small captured graph, in whose fake mode and dynamic sizes all values are made."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.gm = fxopt.capture(
            Seed().eval(), (torch.rand(2, CHANNELS, 4, 4),), dynamic_shapes=({0: "batch"},), modes="both"
        )
        self.graph = self.gm.graph
        self.end = self.graph.output_node()
        self.first = next(iter(self.graph.nodes))
        self.x: torch.fx.Node = self.end.args[0][0]  # type: ignore[index,assignment]
        self.fake_mode = self.x.meta["val"].fake_mode
        self.values: dict[Any, Any] = {}
        self.place: dict[str, Any] = {}
        self.counters: list[tuple[torch.fx.Node, torch.fx.Node]] = []
        self.tied: torch.fx.Node | None = None

    def read(self, path: str, make: Callable[[], torch.Tensor]) -> torch.fx.Node:
        """Register a tensor and read it, before everything else as in a captured graph."""
        tensor = make()
        attach(self.gm, path, tensor)
        with self.graph.inserting_before(self.first):
            node = self.graph.get_attr(path)
        key = (tensor.shape, tensor.dtype, type(tensor))
        if key not in self.values:
            self.values[key] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        node.meta = self.place | {"val": self.values[key]}
        return node

    def call(self, target: Any, *args: Any, modes: dict[str, Any] | None = None) -> torch.fx.Node:
        """Add a call; calls on arguments of the same types share their fake value, which takes long to make."""
        with self.graph.inserting_before(self.end):
            node = self.graph.call_function(target, args)
        kinds = torch.fx.map_arg(args, lambda source: (id(source.meta.get("val")), source.op))
        key = (target, repr(kinds))
        if key not in self.values:
            self.values[key] = None if target is UPDATE_BUFFER else fake_call(target, args, {})
        node.meta = self.place | {"val": self.values[key]}
        if modes:
            node.meta["modes"] = modes
        return node

    def locate(self, path: str) -> None:
        """Say where in the model the next nodes come from."""
        frames = (("forward", 51), ("block", 98))
        trace = "".join(f'  File "{__file__}", line {line}, in {name}\n    {name}(x)\n' for name, line in frames)
        self.place = {
            "stack_trace": trace,
            "nn_module_stack": {"L__self__": ("", "Seed"), f"L__self__{path}": (path, "Block")},
        }

    def norm(self, x: torch.fx.Node, path: str) -> torch.fx.Node:
        """Add a batch norm that counts its batches, in both modes, as capture leaves it."""
        parameters = [
            self.read(f"{path}.{name}", lambda: torch.nn.Parameter(torch.rand(CHANNELS))) for name in ("weight", "bias")
        ]
        mean = self.read(f"{path}.running_mean", lambda: torch.zeros(CHANNELS))
        var = self.read(f"{path}.running_var", lambda: torch.ones(CHANNELS))
        count = self.read(f"{path}.num_batches_tracked", lambda: torch.tensor(0))
        self.counters.append((count, self.call(aten.add.Tensor, count, 1)))
        modes = {"training": (True, False)}
        return self.call(aten.batch_norm.default, x, *parameters, mean, var, False, 0.1, 1e-5, False, modes=modes)

    def block(self, index: int) -> None:
        """Add one block, which ends in a sigmoid or so: values stay near 1, however deep the graph is."""
        path = f"stage{index // BLOCKS_PER_STAGE}.block{index % BLOCKS_PER_STAGE}"
        self.locate(path)
        call, x = self.call, self.x
        kernel = self.read(f"{path}.conv.weight", lambda: torch.nn.Parameter(torch.rand(CHANNELS, CHANNELS, 3, 3) / 9))
        x = self.norm(call(aten.conv2d.default, x, kernel, None, [1, 1], [1, 1]), f"{path}.norm")
        if self.tied is None:
            self.tied = self.read("tied.weight", lambda: torch.nn.Parameter(torch.rand(CHANNELS, CHANNELS, 1, 1)))
        x = self.norm(call(aten.conv2d.default, x, self.tied), f"{path}.tied_norm")
        x = call(aten.contiguous.default, call(aten.dropout.default, x, 0.1, False))
        x = call(aten.permute.default, call(aten.permute.default, x, [0, 2, 3, 1]), [0, 3, 1, 2])
        table = self.read(f"{path}.table", lambda: torch.rand(1, CHANNELS, 4, 4))
        x = call(aten.add.Tensor, x, call(aten.exp.default, call(aten.transpose.int, table, 2, 3)))
        x = call(aten.add.Tensor, call(aten.sigmoid.default, x), call(aten.sigmoid.default, x))
        x = call(aten.relu.default, call(aten.relu.default, x))
        x = call(aten.mul.Tensor, call(aten.clamp.default, call(aten.clamp.default, x, 0, 6), 0.1, 3), 1)
        mixing = self.read(f"{path}.mixing", lambda: torch.nn.Parameter(torch.rand(CHANNELS, CHANNELS, 1, 1)))
        x = call(aten.mul.Tensor, call(aten.conv2d.default, x, mixing), 0.5)
        gate = call(aten.clamp.default, call(aten.add.Tensor, x, 3), 0, 6)
        x = call(aten.div.Tensor, call(aten.mul.Tensor, x, gate), 6)
        x = call(SELECT_MODE, call(aten.tanh.default, x), x, False, modes={"training": (True, False)})
        call(aten.cos.default, self.read(f"{path}.unread", lambda: torch.nn.Parameter(torch.rand(CHANNELS))))
        self.x = self.branch(x, f"branch{index}") if index % BLOCKS_PER_BRANCH == 0 else x

    def branch(self, x: torch.fx.Node, path: str) -> torch.fx.Node:
        """Add a ``torch.cond`` of two graphs with one superfluous call each."""
        predicate = self.call(aten.gt.Scalar, self.call(aten.sum.default, x), 0)
        arms = []
        for arm, ops in (("yes", ((aten.mul.Tensor, 1), (aten.sin.default,))), ("no", ((aten.relu.default,),) * 2)):
            graph = torch.fx.Graph()
            node = graph.placeholder("x")
            node.meta = {"val": x.meta["val"]}
            for target, *rest in ops:
                node = graph.call_function(target, (node, *rest))
                node.meta = self.place | {"val": x.meta["val"]}
            graph.output((node,))
            self.gm.add_module(f"{path}_{arm}", torch.fx.GraphModule(torch.nn.Module(), graph))
            with self.graph.inserting_before(self.end):
                arms.append(self.graph.get_attr(f"{path}_{arm}"))
            arms[-1].meta = dict(self.place)
        with self.graph.inserting_before(self.end):
            cond = self.graph.call_function(torch.ops.higher_order.cond, (predicate, *arms, (x,)))
            part = self.graph.call_function(operator.getitem, (cond, 0))
        cond.meta, part.meta = self.place | {"val": (x.meta["val"],)}, self.place | {"val": x.meta["val"]}
        return part

    def finish(self) -> CapturedModule:
        """Count the batches, return the value of the last block, and generate the code."""
        for count, new in self.counters:
            self.call(UPDATE_BUFFER, count, new, False, modes={"active": (True, False)})
        self.end.args = ((self.x,),)
        self.gm.recompile()
        return self.gm


def build(nodes: int) -> CapturedModule:
    """Return a valid captured graph in evaluation mode, valid in both modes, of about ``nodes`` nodes."""
    builder = Builder()
    for index in itertools.count():
        if len(builder.graph.nodes) + len(builder.counters) >= nodes:
            return builder.finish()
        builder.block(index)
    raise AssertionError("unreachable")
