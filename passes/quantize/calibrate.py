"""Run a graph over calibration data once, and keep a sketch of the values of each tensor that is to be quantized.

The memory is that of one batch: a value is dropped behind its last reader, and a sketch does not grow. A sketch does
not depend on the order of the batches either, so processes may share them: all get the sketches of all data.
"""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fxopt.args import arg, source_line
from fxopt.calibration_data import calibration_length, calibration_samples
from fxopt.dimensions import Sample
from fxopt.errors import CalibrationError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.isolation import isolated
from fxopt.ops import UPDATE_BUFFER
from fxopt.passes.quantize.checkpoint import Checkpoint
from fxopt.passes.quantize.sketch import ValueSketch
from fxopt.regions import COND, WHILE_LOOP

__all__ = ["Progress", "Watch", "calibrate"]

Progress = Callable[[int, int | None], None]
Watch = Callable[[int, torch.fx.Node, Any], None]


def calibrate(
    gm: CapturedModule,
    nodes: Collection[str],
    data: Any,
    *,
    channels: Mapping[str, int] | None = None,
    only: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    group: Any = None,
    watch: Watch | None = None,
) -> dict[str, ValueSketch]:
    """Return a sketch of the values of each named node, over all of ``data``, in evaluation mode.

    Where processes of ``torch.distributed`` run, each calls this with its share of the data, in items of its own, and
    each gets the sketches of all shares: those that one process gets from the same items, bit for bit.

    Args:
        gm: The graph; it is left as it is.
        nodes: Names of nodes that yield a floating-point tensor, as ``Rewriter.site_name`` gives them: ``"path/name"``
            for a node of a graph inside.
        data: As :func:`fxopt.calibration_data.calibration_samples` takes it; batches of any size.
        channels: For some of the nodes the axis along which to keep extremes by channel, too.
        only: For some of the nodes which places along the last axis count, bool[channels]; others may hold anything.
        progress: Is called with the number of items done, and of all items or None, after each item.
        checkpoint: A file that holds the state of an unfinished run. If it is there, the run goes on behind the last
            item in it, which takes the same data in the same order; it is removed in the end. Process r of several
            adds ``.r`` to its name.
        checkpoint_seconds: Time between two writes of the file; 0 writes it after each item.
        group: The process group; the default one if there is one.
        watch: Is called with the number of the item, each node of the graph itself, in a copy of it, and its value.

    Returns:
        A sketch by name. That of a node that never ran, on a side of a branch never taken, has ``count`` 0.

    Raises:
        CalibrationError: an item does not fit; a value is NaN or infinite, where the message names node and source
            line; the checkpoint is of another graph, or other data; another process failed.
        FileFormatError: the checkpoint is damaged.
        ValueError: a name is not that of a node that yields a floating-point tensor; a watch and a checkpoint, which
            would leave out what it is to see.
        ModeError: the graph is valid for training only.
    """
    if watch is not None and checkpoint is not None:
        raise ValueError("watch is to see every item, and a run that goes on from a checkpoint leaves some out")
    ranks = _ranks(group)
    place = None if checkpoint is None else Path(checkpoint if ranks is None else f"{os.fspath(checkpoint)}.{ranks[0]}")
    sketches: dict[str, ValueSketch] = {}
    failure = None
    try:
        run = _Run(gm.clone(), nodes, channels or {}, only or {}, watch)
        sketches = _calibrated(run, data, progress, place, checkpoint_seconds)
    except Exception as error:
        if ranks is None:
            raise
        failure = error  # raised once the other processes, which would wait for ever, know of it
    if ranks is not None:
        sketches = _gathered(sketches, failure, group, ranks[0])
    if place is not None:
        place.unlink(missing_ok=True)
    return sketches


def _calibrated(
    run: _Run, data: Any, progress: Progress | None, place: Path | None, checkpoint_seconds: float
) -> dict[str, ValueSketch]:
    """Return the sketches of this process's items."""
    total = calibration_length(data)
    saved = None if place is None else Checkpoint(place, run.gm, run.sketches)
    done, written = 0, time.monotonic()
    for number, sample in enumerate(calibration_samples(run.gm, data)):
        if saved is None or not saved.covers(number, sample):
            run(sample, number)
        done = number + 1
        if saved is not None and done > saved.items and time.monotonic() - written >= checkpoint_seconds:
            saved.write(done)
            written = time.monotonic()
        if progress is not None:
            progress(done, total)
    if saved is not None:
        saved.check_reached(done)
    return run.sketches


class _Run:
    """A graph, and the sketches that fill while it runs."""

    def __init__(
        self,
        gm: CapturedModule,
        nodes: Collection[str],
        channels: Mapping[str, int],
        only: Mapping[str, torch.Tensor],
        watch: Watch | None,
    ) -> None:
        gm.eval()
        self.gm, self.only, self.watch = gm, only, watch
        self.paths = {module: path for path, module in gm.named_modules()}
        known = {_site(self.paths[module], node): node for module in graph_modules(gm) for node in module.graph.nodes}
        for name in nodes:
            _check_node(name, known)
        unknown = sorted(set(channels) - set(nodes))
        if unknown:
            raise ValueError(f"channels names {', '.join(unknown)}, which is not among the nodes to calibrate")
        self.sketches = {name: ValueSketch(axis=channels.get(name)) for name in nodes}
        self.item = 0
        self._interpreters: dict[torch.fx.GraphModule, _Observer] = {}
        # An item must find the buffers as the first one did, for the sketches not to depend on the order. Where no item
        # writes them, they need not be copied each time.
        self._stateful: torch.nn.Module = gm if any(map(_writes_buffer, known.values())) else torch.nn.Module()

    def __call__(self, sample: Sample, number: int) -> None:
        """Run on one item."""
        self.item = number
        leaves = self.gm.flatten_inputs(*sample.args, **sample.kwargs)
        with isolated(self._stateful):
            self.inside(self.gm, leaves)

    def inside(self, module: torch.fx.GraphModule, arguments: Any) -> Any:
        """Run the graph, or one inside it, on flat arguments."""
        if module not in self._interpreters:
            self._interpreters[module] = _Observer(module, self)
        return self._interpreters[module].run(*arguments, enable_io_processing=False)

    def observe(self, node: torch.fx.Node, site: str, value: Any) -> None:
        """Take in the value of a node."""
        if _pads_with_infinity(node):
            value = _without_infinity(value)
        try:
            self.sketches[site].update(value[..., self.only[site]] if site in self.only else value)
        except CalibrationError as error:
            raise CalibrationError(
                describe(
                    f"item {self.item} of the calibration data: {node.name} yields {error}",
                    source=source_line(node),
                    node=f"{site}, which calls {node.target}" if node.op == "call_function" else site,
                    try_="leave the item out, if the model itself yields this, or this node out of what is quantized",
                )
            ) from None


class _Observer(torch.fx.Interpreter):
    """Runs a graph, drops each value behind its last reader, and shows those of chosen nodes to the run."""

    def __init__(self, module: torch.fx.GraphModule, run: _Run) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False  # it would write into the text of our errors
        self._run = run
        self._watch = run.watch if module is run.gm else None
        sites = {node: _site(run.paths[module], node) for node in module.graph.nodes}
        self._sites = {node: site for node, site in sites.items() if site in run.sketches}

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        site = self._sites.get(n)
        if site is not None:
            self._run.observe(n, site, value)
        if self._watch is not None:
            self._watch(self._run.item, n, value)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call; the side of a branch that is taken, and each turn of a loop, by an observer of its own."""
        if target is COND:
            predicate, when_true, when_false, *operands = args
            return self._run.inside(when_true if bool(predicate) else when_false, operands[0] if operands else ())
        if target is WHILE_LOOP:
            asks, body, carried, *rest = args
            constants = rest[0] if rest else ()
            while bool(_single(self._run.inside(asks, (*carried, *constants)))):
                carried = self._run.inside(body, (*carried, *constants))
            return tuple(carried)
        return super().call_function(target, args, kwargs)


def _single(answer: Any) -> Any:
    return answer[0] if isinstance(answer, tuple | list) else answer


def _site(path: str, node: torch.fx.Node) -> str:
    return f"{path}/{node.name}" if path else node.name


def _pads_with_infinity(node: torch.fx.Node) -> bool:
    """Return whether a call puts infinities at the edges, as in front of a max-pool that is not to see them.

    The end of the integers stands for them: nothing is smaller there either.
    """
    if node.target not in (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default):
        return False
    value = arg(node, "value")
    return isinstance(value, float) and math.isinf(value)


def _without_infinity(value: torch.Tensor) -> torch.Tensor:
    """Return a value with its smallest finite number in place of each infinity, so that its range is that of the rest.

    A value that is infinite everywhere, or NaN somewhere, stays as it is.
    """
    finite = value[value.isfinite()]
    return value.masked_fill(value.isinf(), float(finite.min())) if finite.numel() else value


def _writes_buffer(node: torch.fx.Node) -> bool:
    """Return whether the node writes into a buffer in the mode that the graph is in."""
    if node.target is UPDATE_BUFFER:
        return arg(node, "active") is not False
    return node.target is torch.ops.aten.batch_norm.default and arg(node, "training") is not False


def _check_node(name: str, known: Mapping[str, torch.fx.Node]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise ValueError(f"the graph has no node {name!r}" + (f"; close are {', '.join(close)}" if close else ""))
    value = known[name].meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        got = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"node {name!r} yields {got}, not a tensor of floating type")


def _ranks(group: Any) -> tuple[int, int] | None:
    """Return this process's rank and how many there are, or None outside of torch.distributed."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        if group is not None:
            raise ValueError("a process group is given, but torch.distributed is not initialized")
        return None
    return distributed.get_rank(group), distributed.get_world_size(group)


def _gathered(
    sketches: dict[str, ValueSketch], failure: Exception | None, group: Any, rank: int
) -> dict[str, ValueSketch]:
    """Return the sketches of all processes, merged in the order of their ranks; or raise what failed in one."""
    states = None if failure else {name: sketch.to_state() for name, sketch in sketches.items()}
    outcomes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(outcomes, (states, f"{type(failure).__name__}: {failure}"), group=group)
    if failure is not None:
        raise failure
    for other, (found, text) in enumerate(outcomes):
        if found is None:
            raise CalibrationError(describe(f"calibration failed in process {other}", there=text))
        if found.keys() != sketches.keys():
            raise CalibrationError(
                describe(
                    f"processes {rank} and {other} calibrate different nodes",
                    got=", ".join(sorted(found.keys() ^ sketches.keys())[:8]),
                    try_="the same graph and nodes in each process",
                )
            )
    merged = {name: ValueSketch(axis=sketch.axis) for name, sketch in sketches.items()}
    for found, _ in outcomes:
        for name, state in found.items():
            merged[name].merge(ValueSketch.from_state(state))
    return merged
