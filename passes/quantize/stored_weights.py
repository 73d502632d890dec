"""Which constants are the weights of layers, who else reads them, and how another form of storage takes their place."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterator, Sequence

import torch

from fxopt.args import arg, module_path, tensor_arg
from fxopt.attributes import get_path, owner_of
from fxopt.effects import is_in_place
from fxopt.graph_module import graph_modules
from fxopt.grouped_ops import GROUPED_MM
from fxopt.layer_operators import CELLS, RECURRENT
from fxopt.ops import UPDATE_BUFFER
from fxopt.rewriter import Rewriter

__all__ = [
    "LayerWeight", "StoredWeights", "check_kinds", "check_names", "matrices_of", "named_by", "parameters_of_layer",
    "refusal", "replace_weight", "tensor_bytes", "weights_of",
]  # fmt: skip

Node = torch.fx.Node
aten = torch.ops.aten
_TURNS = (aten.transpose.int, aten.permute.default)


@dataclasses.dataclass(frozen=True)
class LayerWeight:
    """A constant that a layer multiplies by.

    Attributes:
        layer: The first call that reads it.
        reads: Every ``get_attr`` node that reads it, in the order of the graph.
        tensor: The constant, f32.
    """

    layer: Node
    reads: tuple[Node, ...]
    tensor: torch.Tensor

    @property
    def path(self) -> str:
        """The first of its names."""
        return str(self.reads[0].target)

    @property
    def first_reader(self) -> Node:
        """The first node of the graph that reads it."""
        return min(user for read in self.reads for user in read.users)


class StoredWeights:
    """The constants of a graph and of the graphs inside it, by who reads them; found once, before any change."""

    def __init__(self, rw: Rewriter) -> None:
        self._reads: dict[int, list[Node]] = {}
        for module in graph_modules(rw.gm):
            for node in module.graph.nodes:
                if node.op == "get_attr" and isinstance(
                    held := get_path(owner_of(node), str(node.target)), torch.Tensor
                ):
                    self._reads.setdefault(id(held), []).append(node)

    def reads(self, tensor: torch.Tensor) -> list[Node]:
        """Return the ``get_attr`` nodes that read a tensor, by whichever of its names."""
        return self._reads.get(id(tensor), [])

    def weights(
        self, rw: Rewriter, layers: Collection[object], *, skip: Sequence[str], min_elements: int
    ) -> Iterator[LayerWeight]:
        """Yield each weight of the layers once, at the first layer that reads it; what is refused is recorded.

        Args:
            rw: Of the pass. The yield is at the site of the layer.
            layers: Operators with an argument ``weight``, recurrent layers and cells.
            skip: Patterns of names of weights and layers that stay as they are.
            min_elements: Smaller weights stay as they are.
        """
        seen: set[int] = set()
        for layer in rw.calls(*layers):
            for tensor in [rw.tensor(weight) for weight in weights_of(layer) if weight.op == "get_attr"]:
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                reads = self.reads(tensor)
                if (reason := self._refusal(layer, reads, tensor, skip, min_elements)) is not None:
                    rw.skip(layer, reason)
                else:
                    yield LayerWeight(layer, tuple(reads), tensor)

    def _refusal(
        self, layer: Node, reads: Sequence[Node], tensor: torch.Tensor, skip: Sequence[str], min_elements: int
    ) -> str | None:
        if (reason := refusal(layer, reads, tensor, skip, min_elements)) is not None:
            return reason
        if len({read.graph for read in reads}) > 1:
            return "its weight is read by more than one graph"
        if any(user.target is UPDATE_BUFFER or is_in_place(user.target) for read in reads for user in read.users):
            return "the graph writes its weight"
        return None


def parameters_of_layer(call: Node, layer: int) -> list[Node]:
    """Return the weights and biases of one layer of a stack: its first direction, then its second one."""
    found = list(arg(call, "params"))
    size = len(found) // int(arg(call, "num_layers"))
    return found[layer * size : (layer + 1) * size]


def matrices_of(call: Node, layer: int | None = None) -> list[Node]:
    """Return the nodes of the weights of a layer, or of all, each once, biases left out; a cell has one layer."""
    if call.target in CELLS:
        return list(dict.fromkeys([arg(call, "w_ih"), arg(call, "w_hh")]))
    each = 4 if arg(call, "has_biases") else 2
    parameters = arg(call, "params") if layer is None else parameters_of_layer(call, layer)
    return list(dict.fromkeys(node for place, node in enumerate(parameters) if place % each < 2))


def weights_of(layer: Node) -> list[Node]:
    """Return the nodes of what a layer multiplies by: its ``weight``, or the matrices of a recurrent layer or cell."""
    if layer.target in (*RECURRENT, *CELLS):
        return matrices_of(layer)
    weight = tensor_arg(layer, "weight")
    while layer.target is GROUPED_MM and weight.target in _TURNS:
        weight = tensor_arg(weight, "self")
    return [weight]


def refusal(
    layer: Node, reads: Sequence[Node], tensor: torch.Tensor, skip: Sequence[str], min_elements: int
) -> str | None:
    """Return why a weight stays as it is, whatever becomes of others: name, type, size, values; None if it need not."""
    if named_by(skip, layer, reads):
        return "its name is one to skip"
    if tensor.dtype is not torch.float32:
        return f"its weight is {tensor.dtype}"
    if tensor.numel() < max(min_elements, 1):
        return f"its weight has {tensor.numel()} elements, fewer than {max(min_elements, 1)}"
    if not bool(tensor.isfinite().all()):
        return "its weight holds NaN or infinity"
    return None


def named_by(patterns: Sequence[str], layer: Node, reads: Sequence[Node]) -> bool:
    """Return whether a pattern such as ``"encoder.*"`` fits the name of a layer's node, module or weight."""
    names = [layer.name, module_path(layer), *(str(read.target) for read in reads)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def check_names(patterns: object, option: str = "skip") -> None:
    """Raise TypeError unless ``patterns`` is a tuple of texts: one text would be taken for a list of letters."""
    if not isinstance(patterns, tuple) or not all(isinstance(item, str) for item in patterns):
        raise TypeError(f"{option} is {patterns!r}; wanted a tuple of patterns, such as ('head*',)")


def check_kinds(kinds: object, known: Sequence[str]) -> None:
    """Raise TypeError unless ``kinds`` is a tuple, ValueError if it is empty or names what is not known."""
    if not isinstance(kinds, tuple):
        raise TypeError(f"kinds is {kinds!r}; wanted a tuple, such as {tuple(known[:2])}")
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"kinds holds {unknown[0]!r}; wanted {', '.join(known)}")
    if not kinds:
        raise ValueError(f"kinds is empty; wanted some of {', '.join(known)}")


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Return the bytes of the elements of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def replace_weight(rw: Rewriter, weight: LayerWeight, new: Node, *, why: str) -> None:
    """Let all that read a weight, under whichever of its names, read ``new``, which stands before the first of them."""
    for read in weight.reads:
        rw.replace_value(read, new, why=why)
