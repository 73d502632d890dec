"""What an exported model is compared on: the samples of its graph, other values, other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxopt.dimensions import Sample
from fxopt.errors import GuardError
from fxopt.export.guards import has_guards
from fxopt.export.report import ValidationReport
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.regions import holds_control_flow

__all__ = ["Case", "cases"]

_SIZES = (1, 2, 5)


@dataclasses.dataclass(frozen=True)
class Case:
    """One run to compare by.

    Attributes:
        label: What to call it.
        leaves: Flat inputs.
        outputs: Flat outputs of the graph; None where a guard of the graph does not hold.
        drawn: Whether the values were drawn, and nobody promised anything of them.
    """

    label: str
    leaves: list[Any]
    outputs: tuple[Any, ...] | None
    drawn: bool = False

    @property
    def wanted(self) -> list[tuple[int, Any]]:
        """The outputs that are not None, with their place."""
        return [(place, output) for place, output in enumerate(self.outputs or ()) if output is not None]


def cases(gm: CapturedModule, inputs: Sequence[Any] | None, sizes: bool, report: ValidationReport) -> Iterator[Case]:
    """Yield inputs with the outputs of the graph; what the graph itself cannot run becomes a note."""
    for label, sample, drawn in _samples(gm, inputs, sizes):
        try:
            leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
            copy = sample.clone()
            with isolated(gm):
                outputs = gm.flat_outputs(*copy.args, **dict(copy.kwargs))
        except GuardError:
            report.notes.append(f"not compared on {label}: a guard of the graph does not hold")
            yield Case(label, leaves, None, drawn)
            continue
        except Exception as error:
            report.notes.append(
                f"not compared on {label}: the graph itself cannot run it: {str(error).splitlines()[0][:160]}"
            )
            continue
        yield Case(label, leaves, outputs, drawn)


def _samples(gm: CapturedModule, inputs: Sequence[Any] | None, sizes: bool) -> Iterator[tuple[str, Sample, bool]]:
    given = [Sample.of(one) for one in inputs] if inputs is not None else list(gm.samples)
    for index, sample in enumerate(given):
        yield f"sample {index}", sample, False
    if not given:
        return
    if inputs is None:
        yield "other values", _other_values(given[0]), True
    if inputs is None and (holds_control_flow(gm) or has_guards(gm)):
        for label, sample in given[0].other_ways():
            yield f"sample 0 {label}", sample, True
    if not sizes or not gm.dims:
        return
    seen = {tuple(sorted(gm.sizes_of(sample.leaves()).items())) for sample in given}
    for size in _SIZES:
        chosen = {name: min(max(size, d.min), size if d.max is None else d.max) for name, d in gm.dims.items()}
        if tuple(sorted(chosen.items())) not in seen:
            seen.add(tuple(sorted(chosen.items())))
            yield (
                ", ".join(f"{name} = {value}" for name, value in chosen.items()),
                gm.resized(chosen, _other_values(given[0])),
                True,
            )


def _other_values(sample: Sample) -> Sample:
    """Return a sample of the same sizes and other values: normal ones of like scale, integers and flags shuffled."""
    generator = torch.Generator().manual_seed(len(sample.leaves()))

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.numel() < 2:
            return leaf
        if _is_ordered(leaf):
            return leaf
        if leaf.is_floating_point():
            finite = leaf[leaf.isfinite()].double()
            if bool((finite == finite.round()).all()) or finite.numel() < 2:
                return leaf  # a mask, or counts
            spread, middle = float(finite.std()), float(finite.mean())
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * (spread or 1.0) + middle
            low, high = float(finite.min()), float(finite.max())
            # Clamped, many would be the same, and the order of equal values is nobody's promise.
            inside = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) * (high - low) + low
            return torch.where((drawn < low) | (drawn > high), inside, drawn).to(leaf.dtype)
        return leaf.flatten()[torch.randperm(leaf.numel(), generator=generator)].view(leaf.shape)

    return sample.map(other)


def _is_ordered(leaf: torch.Tensor) -> bool:
    """Return whether the order of the elements may have a meaning: offsets, boundaries, masks that descend."""
    step = leaf.reshape(-1, leaf.shape[-1]).double().diff()
    return bool((step >= 0).all() or (step <= 0).all())
