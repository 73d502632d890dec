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
from fxopt.numerics import coarsest_eps, largest_noise, measure
from fxopt.regions import holds_control_flow

__all__ = ["Case", "cases", "drowns", "nearer_case"]

_SIZES = (1, 2, 5)
_NEAR = 0.01  # of the spread


@dataclasses.dataclass(frozen=True)
class Case:
    """One run to compare by.

    Attributes:
        label: What to call it.
        sample: The inputs.
        leaves: The same, flat.
        outputs: Flat outputs of the graph; None where a guard of the graph does not hold.
        drawn: Whether the values were drawn, and nobody promised anything of them.
        nearer: An input of the same sizes whose values are drawn near those of the example, if these are drawn apart.
    """

    label: str
    sample: Sample
    leaves: list[Any]
    outputs: tuple[Any, ...] | None
    drawn: bool = False
    nearer: Sample | None = None

    @property
    def wanted(self) -> list[tuple[int, Any]]:
        """The outputs that are not None, with their place."""
        return [(place, output) for place, output in enumerate(self.outputs or ()) if output is not None]


def cases(gm: CapturedModule, inputs: Sequence[Any] | None, sizes: bool, report: ValidationReport) -> Iterator[Case]:
    """Yield inputs with the outputs of the graph; what the graph itself cannot run becomes a note."""
    for label, sample, drawn, nearer in _samples(gm, inputs, sizes):
        case = _case(gm, label, sample, report, drawn=drawn, nearer=nearer)
        if case is not None:
            yield case


def drowns(gm: CapturedModule, case: Case) -> bool:
    """Return whether values that were drawn apart from the example's prove nothing.

    They do not if one more rounding of the inputs moves an output by half of all its digits: recurrent layers, for
    one, may be stable on what they were trained on and chaotic on anything else.
    """
    if case.nearer is None:
        return False
    moved, eps = _nudged(case.sample), coarsest_eps(gm)
    with isolated(gm):
        outputs = gm.flat_outputs(*moved.args, **dict(moved.kwargs))
    pairs = [(want, outputs[place]) for place, want in case.wanted if isinstance(want, torch.Tensor)]
    return any(
        want.is_floating_point() and measure(want, other).max_abs > largest_noise(want, want, eps) > 0
        for want, other in pairs
    )


def nearer_case(gm: CapturedModule, case: Case, report: ValidationReport) -> Case | None:
    """Return what stands for a case that proves nothing, with a note of it; None if the graph cannot run that."""
    assert case.nearer is not None
    label = f"{case.label} near the example's"
    report.notes.append(f"compared on {label}: farther away, one rounding of the inputs moves half of all digits")
    found = _case(gm, label, case.nearer, report, drawn=True)
    return None if found is None or found.outputs is None else found


def _case(
    gm: CapturedModule,
    label: str,
    sample: Sample,
    report: ValidationReport,
    *,
    drawn: bool = False,
    nearer: Sample | None = None,
) -> Case | None:
    """Return an input with the outputs of the graph; None, with a note, where the graph itself cannot run it."""
    try:
        leaves = gm.flatten_inputs(*sample.args, **dict(sample.kwargs))
        copy = sample.clone()
        with isolated(gm):
            outputs = gm.flat_outputs(*copy.args, **dict(copy.kwargs))
    except GuardError:
        report.notes.append(f"not compared on {label}: a guard of the graph does not hold")
        return Case(label, sample, leaves, None, drawn)
    except Exception as error:
        report.notes.append(
            f"not compared on {label}: the graph itself cannot run it: {str(error).splitlines()[0][:160]}"
        )
        return None
    return Case(label, sample, leaves, outputs, drawn, nearer)


def _samples(
    gm: CapturedModule, inputs: Sequence[Any] | None, sizes: bool
) -> Iterator[tuple[str, Sample, bool, Sample | None]]:
    given = [Sample.of(one) for one in inputs] if inputs is not None else list(gm.samples)
    for index, sample in enumerate(given):
        yield f"sample {index}", sample, False, None
    if not given:
        return
    other, near = _other_values(given[0]), _other_values(given[0], near=True)
    if inputs is None:
        yield "other values", other, True, near
    if inputs is None and (holds_control_flow(gm) or has_guards(gm)):
        for label, sample in given[0].other_ways():
            yield f"sample 0 {label}", sample, True, None
    if not sizes or not gm.dims:
        return
    seen = {tuple(sorted(gm.sizes_of(sample.leaves()).items())) for sample in given}
    for size in _SIZES:
        chosen = {name: min(max(size, d.min), size if d.max is None else d.max) for name, d in gm.dims.items()}
        if tuple(sorted(chosen.items())) not in seen:
            seen.add(tuple(sorted(chosen.items())))
            yield (
                ", ".join(f"{name} = {value}" for name, value in chosen.items()),
                gm.resized(chosen, other),
                True,
                gm.resized(chosen, near),
            )


def _other_values(sample: Sample, *, near: bool = False) -> Sample:
    """Return a sample of the same sizes and other values: normal ones of like scale, integers and flags shuffled.

    Args:
        sample: The example.
        near: Floats differ from the example's by a hundredth of their spread alone, and nothing else does.
    """
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
            if near:
                return (leaf + _NEAR * (drawn - middle)).to(leaf.dtype)
            low, high = float(finite.min()), float(finite.max())
            # Clamped, many would be the same, and the order of equal values is nobody's promise.
            inside = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) * (high - low) + low
            return torch.where((drawn < low) | (drawn > high), inside, drawn).to(leaf.dtype)
        if near:
            return leaf
        return leaf.flatten()[torch.randperm(leaf.numel(), generator=generator)].view(leaf.shape)

    return sample.map(other)


def _nudged(sample: Sample) -> Sample:
    """Return a sample with each float moved by one rounding, up or down."""
    generator = torch.Generator().manual_seed(0)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        up = torch.rand(leaf.shape, generator=generator) < 0.5
        return torch.nextafter(leaf, torch.where(up, torch.inf, -torch.inf).to(leaf.dtype))

    return sample.map(moved)


def _is_ordered(leaf: torch.Tensor) -> bool:
    """Return whether the order of the elements may have a meaning: offsets, boundaries, masks that descend."""
    step = leaf.reshape(-1, leaf.shape[-1]).double().diff()
    return bool((step >= 0).all() or (step <= 0).all())
