"""Which weights are kept: masks of parameters, as a plan that can be printed, edited and saved."""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Iterator, Mapping

import torch

from fxopt.args import arg, shape_text
from fxopt.attributes import get_path, owner_of
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule, graph_modules
from fxopt.name_patterns import names_fitting
from fxopt.normalization_ops import MASKED_GROUP_NORM, MASKED_LAYER_NORM
from fxopt.ops import UPDATE_BUFFER

__all__ = ["MaskPlan", "compressed_sizes", "is_masked", "kept_slices", "masked_parts", "masked_products", "norm_masks"]

aten = torch.ops.aten


class MaskPlan(Mapping[str, torch.Tensor]):
    """Masks by the name of the parameter, bool in its shape, true where a weight is kept. Never changed but copied.

    Attributes:
        channels: Masks of channels, bool[C], by the name of the call of a layer or group norm whose mean and variance
            are to leave out the masked ones.
        notes: What could not be pruned, ``{parameter: reason}``.
    """

    def __init__(
        self,
        masks: Mapping[str, torch.Tensor],
        channels: Mapping[str, torch.Tensor] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        for name, mask in {**masks, **(channels or {})}.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                got = shape_text(mask) if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(f"the mask of {name!r} is {got}; wanted a tensor of bool, true where a weight is kept")
        self._masks = dict(masks)
        self.channels = dict(channels or {})
        self.notes = dict(notes or {})

    @classmethod
    def of(cls, gm: CapturedModule) -> MaskPlan:
        """Return copies of the masks that a graph holds; an empty plan if it holds none."""
        names = {id(parameter): name for name, parameter in gm.named_parameters()}
        found: dict[str, torch.Tensor] = {}
        for weight, mask in masked_products(gm):
            if (name := names.get(id(_read(weight)))) is not None:
                kept = _read(mask).cpu()
                found[name] = found[name] & kept if name in found else kept.clone()
        masks = {name: found[name] for name in names.values() if name in found}
        return cls(masks, {name: _read(mask).cpu().clone() for name, mask in norm_masks(gm)})

    def __getitem__(self, parameter: str) -> torch.Tensor:
        return self._masks[parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, MaskPlan) and _equal(self._masks, other._masks) and _equal(self.channels, other.channels)
        )

    def __hash__(self) -> int:
        return hash(tuple(self._masks))

    @property
    def kept(self) -> float:
        """The share of the masked parameters' weights that is kept; 1.0 for an empty plan."""
        total = sum(mask.numel() for mask in self._masks.values())
        return sum(int(mask.sum()) for mask in self._masks.values()) / total if total else 1.0

    def matching(self, *patterns: str) -> tuple[str, ...]:
        """Return the parameters whose name fits one of the patterns, ``"layer1.*"``.

        Raises:
            PassError: a pattern fits none.
        """
        return names_fitting(self._masks, patterns, of="parameter of the plan")

    def without(self, *patterns: str) -> MaskPlan:
        """Return the plan that keeps these parameters whole.

        What other parameters lose with them stays masked, so a channel may then be masked and yet not be removable.
        """
        gone = set(self.matching(*patterns))
        return MaskPlan({n: m for n, m in self._masks.items() if n not in gone}, self.channels, self.notes)

    def with_masks(self, masks: Mapping[str, torch.Tensor]) -> MaskPlan:
        """Return the plan with these masks in place of those of the same name, or behind them."""
        return MaskPlan({**self._masks, **masks}, self.channels, self.notes)

    def joined(self, other: MaskPlan) -> MaskPlan:
        """Return the plan that masks what either plan masks."""
        masks = {n: m & other[n] if n in other else m for n, m in self._masks.items()}
        channels = {n: m & other.channels[n] if n in other.channels else m for n, m in self.channels.items()}
        return MaskPlan({**other, **masks}, {**other.channels, **channels}, {**other.notes, **self.notes})

    def __str__(self) -> str:
        rows = [(name, shape_text(mask), mask) for name, mask in {**self._masks, **self.channels}.items()]
        wide = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [
            f"{name:<{wide[0]}}  {shape:<{wide[1]}}  {int(mask.sum()):>9,} of {mask.numel():>9,} kept{_axes(mask)}"
            for name, shape, mask in rows
        ]
        return "\n".join([*lines, *(f"not pruned: {name}: {reason}" for name, reason in self.notes.items())])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file of torch."""
        torch.save({"masks": self._masks, "channels": self.channels, "notes": self.notes}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PassError: the file is not such a plan.
        """
        try:
            held = torch.load(path, weights_only=True)
            return cls(held["masks"], held["channels"], held["notes"])
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError, EOFError) as error:
            raise PassError(
                describe(
                    f"{os.fspath(path)} holds no plan of masks",
                    got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                    wanted="a file that MaskPlan.save wrote",
                )
            ) from error


def _equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _axes(mask: torch.Tensor) -> str:
    """Return in words how many slices of the first two axes are masked as a whole."""
    words = []
    for dim, word in enumerate(("rows", "columns")[: mask.ndim if mask.ndim > 1 else 0]):
        gone = int((~kept_slices(mask, dim)).sum())
        words += [f"{gone} of {mask.shape[dim]} {word} masked"] if gone else []
    return "; " + ", ".join(words) if words else ""


def kept_slices(mask: torch.Tensor, dim: int) -> torch.Tensor:
    """Return which slices along an axis a mask keeps something of, bool[size]."""
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(dim=1)


def _read(node: torch.fx.Node) -> torch.Tensor:
    found: torch.Tensor = get_path(owner_of(node), str(node.target))
    return found


def is_masked(node: torch.fx.Node) -> bool:
    """Return whether a node is a masked weight: the product of a parameter and a buffer of bool."""
    return masked_parts(node) is not None


def masked_parts(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """Return the nodes that read weight and mask of a masked weight, or None if the node is none.

    A mask has the shape of its weight, and the graph does not write it.
    """
    if node.target is not aten.mul.Tensor or len(node.args) != 2:
        return None
    weight, mask = node.args
    if not isinstance(weight, torch.fx.Node) or not isinstance(mask, torch.fx.Node):
        return None
    if weight.op != "get_attr" or mask.op != "get_attr":
        return None
    tensor, kept = (get_path(owner_of(node), str(source.target)) for source in (weight, mask))
    if not tensor.is_floating_point() or kept.dtype != torch.bool or kept.shape != tensor.shape:
        return None
    return None if _is_written(mask) else (weight, mask)


def _is_written(buffer: torch.fx.Node) -> bool:
    writes = buffer.graph.find_nodes(op="call_function", target=UPDATE_BUFFER)
    return any(isinstance(at := node.args[0], torch.fx.Node) and at.target == buffer.target for node in writes)


def masked_products(gm: torch.fx.GraphModule) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    """Yield the nodes that read weight and mask of every masked weight, graphs inside the graph included."""
    for module in graph_modules(gm):
        for node in list(module.graph.nodes):
            if (parts := masked_parts(node)) is not None:
                yield parts


def compressed_sizes(gm: torch.fx.GraphModule) -> tuple[int, int]:
    """Return the bytes of all masked weights, and what zlib makes of them."""
    whole = compressed = 0
    for weight, _ in masked_products(gm):
        numbers = _read(weight).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        whole += len(numbers)
        compressed += len(zlib.compress(numbers, 1))
    return whole, compressed


def norm_masks(gm: torch.fx.GraphModule) -> Iterator[tuple[str, torch.fx.Node]]:
    """Yield the name of every norm that leaves channels out, and the node that reads its mask."""
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            if node.target in (MASKED_LAYER_NORM, MASKED_GROUP_NORM):
                mask = arg(node, "mask")
                if mask.op == "get_attr":
                    yield node.name, mask
