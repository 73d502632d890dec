"""Where to put the quantizers, so that the target computes as much as it can in integers.

Demand flows backwards from the heavy kernels: a value is wanted in integers if a heavy kernel reads it, or a joining
kernel or a move whose own result is wanted. A joining kernel joins if, besides, integers arrive at it. Both depend on
each other, so all candidates are taken in first and those are dropped that do not hold, until none is (the greatest
fixed point). Moves are passed backwards: the quantizer stands before them, and they move integers.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from fxopt.args import arg, module_path, shape, tensor_arg
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.limits import limits_of
from fxopt.passes.quantize.matrix_uses import LOOKUPS
from fxopt.passes.quantize.shared_scales import Bounds, bounds_of, shared_scales
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.target import Kernel, Output, Target

__all__ = [
    "Site",
    "all_sites",
    "integer_sites",
    "is_float",
    "kernel_of",
    "move_source",
    "node_names",
    "operands_of",
    "path_of",
    "patterns_fitting",
    "place",
    "result_of",
]

aten = torch.ops.aten

_POOLS = {aten.max_pool2d.default}


@dataclasses.dataclass(frozen=True)
class Site:
    """A call that the target can compute in integers.

    Attributes:
        node: The call.
        kernel: The kernel.
        operands: What it reads, constants included.
        weight: The one of them that is a constant with scales by channel, or None.
        result: Where its result is quantized: at the call, or at the limit behind it that saturation stands for.
    """

    node: torch.fx.Node
    kernel: Kernel
    operands: tuple[torch.fx.Node, ...]
    weight: torch.fx.Node | None
    result: torch.fx.Node

    @property
    def is_convolution(self) -> bool:
        """Whether the call slides its weight along axes."""
        return "conv" in str(self.node.target)

    @property
    def channel_axis(self) -> int:
        """The axis of the result of a layer along which its bias lies: 0 of one image without a batch around it."""
        if not self.is_convolution or self.weight is None:
            return -1
        return len(shape(self.node)) - len(shape(self.weight)) + 1

    @property
    def is_layer(self) -> bool:
        """Whether the call is heavy and multiplies by a constant weight."""
        return self.kernel.heavy and self.weight is not None

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for everything else."""
        return int(arg(self.node, "groups")) if self.is_convolution else 1

    @property
    def output(self) -> Output:
        """Whether its result must, should or need not be requantized; windows of one group alone are a matrix."""
        windows = self.weight is not None and self.groups == 1 and len(shape(self.node)) == len(shape(self.weight))
        return "required" if self.kernel.output == "preferred" and not windows else self.kernel.output

    def limits(self) -> Iterator[tuple[float | None, float | None]]:
        """Yield the smallest and largest result of each limit between the call and its result; None for no end."""
        for limit in self.limit_nodes():
            yield limits_of(limit) or (None, None)

    def limit_nodes(self) -> Iterator[torch.fx.Node]:
        """Yield the limits behind the call, from its result on, which is the last of them if there are any."""
        limit = self.result
        while limit is not self.node:
            yield limit
            limit = limit.args[0]  # type: ignore[assignment]  # a limit reads the node in front of it


def node_names(gm: CapturedModule) -> set[str]:
    """Return the names that a plan can have: those of all nodes, with the path of their graph in front."""
    prefixes = path_of(gm)
    return {prefixes[module.graph] + node.name for module in graph_modules(gm) for node in module.graph.nodes}


def all_sites(gm: CapturedModule, target: Target) -> Iterator[tuple[str, Site]]:
    """Yield the sites of all graphs, each with what stands before the names of its graph's nodes."""
    for graph, prefix in path_of(gm).items():
        for site in integer_sites(graph, target, {}, prefix):
            yield prefix, site


def path_of(gm: CapturedModule) -> dict[torch.fx.Graph, str]:
    """Return what stands before the names of each graph's nodes: nothing, or the path of an inner graph and a slash."""
    paths = {module: path for path, module in gm.named_modules() if isinstance(module, torch.fx.GraphModule)}
    return {module.graph: f"{path}/" if path else "" for module, path in paths.items()}


def place(
    gm: CapturedModule,
    target: Target,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    skip: Sequence[str] = (),
    floats: Collection[str] = (),
) -> QuantPlan:
    """Return the plan, without scales, that lets ``target`` compute most of ``gm`` in integers.

    Args:
        gm: A graph in evaluation, batch norms folded.
        target: What the runtime can.
        bits: Width of activations.
        weight_bits: Width of weights; as activations, but at most 8, if not given.
        skip: Patterns of what stays float: names of calls, of parameters (``"features.0.*"``) or of modules.
        floats: Names of calls that stay float, besides.

    Raises:
        PassError: a pattern fits nothing that has an integer kernel, and no embedding that is left float.
    """
    specs: dict[str, QuantSpec] = {}
    notes: dict[str, str] = {}
    unused = set(skip)
    prefixes = path_of(gm)
    for module in graph_modules(gm):
        prefix = prefixes[module.graph]
        found = list(integer_sites(module.graph, target, notes, prefix))
        left = {site.node: names for site in found if (names := patterns_fitting(site.node, site.weight, skip, prefix))}
        unused -= {pattern for names in left.values() for pattern in names}
        for call in (node for node in module.graph.nodes if node.target in LOOKUPS):  # not stored as integers: skipped
            unused -= set(patterns_fitting(call, tensor_arg(call, "weight"), skip, prefix))
        kept = [site for site in found if site.node not in left and prefix + site.node.name not in floats]
        placed = _Placement(module, target, prefix, kept)
        specs |= placed.specs(bits, min(bits, 8) if weight_bits is None else weight_bits)
    if unused:
        raise PassError(
            describe(
                f"nothing that has an integer kernel, and no embedding, fits {unused.pop()!r}",
                wanted="a pattern of names of calls, parameters or modules, such as 'conv2d_3', 'features.0.*'",
            )
        )
    return QuantPlan(specs, notes)


def patterns_fitting(
    call: torch.fx.Node, weight: torch.fx.Node | None, patterns: Sequence[str], prefix: str
) -> list[str]:
    """Return the patterns that fit a name of a call, its weight or its module."""
    names = [prefix + call.name, module_path(call)]
    names += [] if weight is None else [prefix + weight.name, str(weight.target)]
    return [pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in names)]


def kernel_of(node: torch.fx.Node, target: Target) -> Kernel | None:
    """Return the integer kernel of a call, or None if it has none."""
    return target.kernels.get(node.target) if node.op == "call_function" and is_float(node) else None


def is_float(node: torch.fx.Node) -> bool:
    """Return whether a node yields one tensor of 32-bit floats."""
    held = node.meta.get("val")
    return isinstance(held, torch.Tensor) and held.dtype is torch.float32


def operands_of(node: torch.fx.Node, kernel: Kernel) -> tuple[torch.fx.Node, ...] | None:
    """Return the operands of a call that must be integers; None if one of them is no float tensor."""
    found: list[torch.fx.Node] = []
    for name in kernel.operands:
        held = arg(node, name)
        found += held if isinstance(held, list | tuple) else [held]
    if all(isinstance(item, torch.fx.Node) and is_float(item) for item in found):
        return tuple(found)
    return None


def result_of(node: torch.fx.Node, target: Target) -> torch.fx.Node:
    """Return the last of the limits behind a call that the saturation of its quantized result can stand for."""
    users = list(node.users)
    if len(users) == 1 and _is_saturation(users[0], node, target):
        return result_of(users[0], target)
    return node


def _is_saturation(node: torch.fx.Node, source: torch.fx.Node, target: Target) -> bool:
    """Return whether ``node`` cuts ``source`` off at 0 and maybe at something above.

    Where the smallest integer stands for 0 and the largest for no more than the upper limit, integers cannot leave the
    limits. With a lower limit below 0 that cannot be had: the zero point is rounded, and the ends with it.
    """
    ends = limits_of(node)
    if ends is None or node.args[0] is not source or target.symmetric_activations:
        return False
    low, high = ends
    return low == 0 and (high is None or high > 0)


def integer_sites(graph: torch.fx.Graph, target: Target, notes: dict[str, str], prefix: str = "") -> Iterator[Site]:
    """Yield the calls that have an integer kernel for the operands that they have; near misses go to ``notes``."""
    for node in graph.nodes:
        kernel = kernel_of(node, target)
        if kernel is None:
            if node.target in target.unused:
                notes[prefix + node.name] = target.unused[node.target]
            continue
        operands = operands_of(node, kernel)
        if operands is None:
            if kernel.heavy:
                notes[prefix + node.name] = "an operand is not a tensor of 32-bit floats"
            continue
        weight = _weight(node, kernel)
        problem = _problem(node, kernel, operands, weight) or _too_few(node, weight, target)
        if problem is None:
            yield Site(node, kernel, operands, weight, result_of(node, target))
        elif kernel.heavy:
            notes[prefix + node.name] = problem


def _too_few(node: torch.fx.Node, weight: torch.fx.Node | None, target: Target) -> str | None:
    """Return why floats are as fast at a product with a constant matrix, or None if they are not."""
    if weight is None or len(shape(weight)) != 2:
        return None
    terms = shape(weight)[1 - target.kernels[node.target].weight_axis]
    return f"each number is the sum of {terms} products alone" if terms < target.fewest_terms else None


def _weight(node: torch.fx.Node, kernel: Kernel) -> torch.fx.Node | None:
    held = arg(node, kernel.weight) if kernel.weight is not None else None
    return held if isinstance(held, torch.fx.Node) and held.op == "get_attr" else None


def _problem(
    node: torch.fx.Node, kernel: Kernel, operands: tuple[torch.fx.Node, ...], weight: torch.fx.Node | None
) -> str | None:
    """Return why the kernel does not fit this call, or None if it does."""
    if any(operand.op == "get_attr" and operand is not weight for operand in operands):
        return "an operand is a constant where the kernel takes activations"
    if weight is None and kernel.bias is not None and kernel.heavy and kernel.weight in ("weight", "mat2"):
        return "its weight is computed when the graph runs"
    if node.target is aten.add.Tensor and arg(node, "alpha") != 1:
        return "alpha is not 1"
    if node.target is aten.addmm.default and (arg(node, "alpha") != 1 or arg(node, "beta") != 1):
        return "alpha or beta is not 1"
    if weight is not None and kernel.weight_axis == 1 and len(shape(weight)) != 2:
        return "its constant operand is not a matrix"
    if kernel.bias is not None:
        bias = arg(node, kernel.bias)
        if bias is not None and (bias.op != "get_attr" or len(shape(bias)) != 1):
            return "its bias is not a constant vector"
    return None


class _Placement:
    """The values of one graph that are wanted in integers."""

    def __init__(self, module: torch.fx.GraphModule, target: Target, prefix: str, sites: Sequence[Site]) -> None:
        self.target, self.prefix = target, prefix
        self.sites = {site.node: site for site in sites}
        self.order = list(module.graph.nodes)
        self.moves = {node: source for node in self.order if (source := move_source(node, target)) is not None}
        self.heavy = [site for site in self.sites.values() if site.kernel.heavy]
        self.joining = {site.node for site in self.sites.values() if not site.kernel.heavy}
        self.forced = {op for site in self.heavy for op in site.operands if op is not site.weight}
        self.forced |= {site.result for site in self.heavy if site.output != "optional"}
        while self._drop():
            pass
        self.wanted = self._wanted()

    def _drop(self) -> bool:
        """Drop joining kernels that integers do not arrive at or whose result nobody wants; say whether there were."""
        demanded, available = self._demanded(), self._available()
        kept = {
            node
            for node in self.joining
            if self.sites[node].result in demanded and any(op in available for op in self.sites[node].operands)
        }
        dropped = len(kept) < len(self.joining)
        self.joining = kept
        return dropped

    def _demanded(self) -> set[torch.fx.Node]:
        demanded = {op for site in self.heavy for op in site.operands if op is not site.weight}
        results = {self.sites[node].result: node for node in self.joining}
        for node in reversed(self.order):
            if node in results and node in demanded:
                demanded |= set(self.sites[results[node]].operands)
            if node in self.moves and node in demanded:
                demanded.add(self.moves[node])
        return demanded

    def _available(self) -> set[torch.fx.Node]:
        available = set(self.forced)
        results = {self.sites[node].result for node in self.joining}
        for node in self.order:
            if node in results or (node in self.moves and self.moves[node] in available):
                available.add(node)
        return available

    def _wanted(self) -> set[torch.fx.Node]:
        wanted = set(self.forced)
        for node in self.joining:
            wanted |= {self.sites[node].result, *self.sites[node].operands}
        made = self._available()
        for node in reversed(self.order):
            # Behind a pool of floats there are fewer numbers to quantize than in front.
            if node in wanted and node in self.moves and (node.target not in _POOLS or self.moves[node] in made):
                wanted.add(self.moves[node])
        return wanted

    def specs(self, bits: int, weight_bits: int) -> dict[str, QuantSpec]:
        """Return one entry for each wanted value and each weight, in the order of the graph."""
        groups = self._groups()
        activation = QuantSpec(
            bits=bits, signed=self.target.signed_activations, symmetric=self.target.symmetric_activations
        )
        weights = {site.weight: site for site in self.heavy if site.weight is not None}
        found: dict[str, QuantSpec] = {}
        for node in self.order:
            name = self.prefix + node.name
            if node in weights:
                axis = weights[node].kernel.weight_axis
                found[name] = QuantSpec("weight", weight_bits, signed=True, symmetric=True, axis=axis)
            elif node in self.wanted:
                found[name] = dataclasses.replace(activation, group=groups.get(node, ""))
        return found

    def _groups(self) -> dict[torch.fx.Node, str]:
        """Return the name of each group of values that share a scale."""
        moves = {node: source for node, source in self.moves.items() if node in self.wanted}
        joins = [
            (self.sites[node].result, operand)
            for node in self.order
            if node in self.joining and self.sites[node].kernel.same_scale
            for operand in self.sites[node].operands
        ]
        limits = {site.result: _both(site.limits()) for site in self.sites.values()}
        known: dict[torch.fx.Node, Bounds] = {}

        def bounds(node: torch.fx.Node) -> Bounds:
            if node not in known:
                known[node] = bounds_of(node, self._limits, self.moves)
            return known[node]

        shared = shared_scales(moves, joins, limits, bounds)
        return {node: self.prefix + root.name for node, root in shared.items()}

    def _limits(self, node: torch.fx.Node) -> Bounds | None:
        ends = limits_of(node)
        return None if ends is None else _both([ends])


def _both(limits: Iterable[tuple[float | None, float | None]]) -> Bounds:
    """Return the interval that lies in all of these; None is no end."""
    low, high = -math.inf, math.inf
    for lowest, highest in limits:
        low = low if lowest is None else max(low, lowest)
        high = high if highest is None else min(high, highest)
    return low, high


def move_source(node: torch.fx.Node, target: Target) -> torch.fx.Node | None:
    """Return the float tensor that ``node`` only moves, or None if it does something else."""
    if node.op != "call_function" or node.target not in target.moves or not is_float(node):
        return None
    held = arg(node, target.moves[node.target])
    return held if isinstance(held, torch.fx.Node) and held.op != "get_attr" and is_float(held) else None
