"""Small nets with random parameters, and what it takes to prune, shrink and compare one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fxopt
from fxopt.attributes import get_path
from fxopt.checks import verify
from fxopt.export import to_onnx
from fxopt.passes.prune import ShrinkMasked
from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.groups import Family, Group, families_of
from fxopt.passes.prune.removal import Removal
from fxopt.passes.prune.structure import Structure


def randomized(model: nn.Module, deviation: float = 1.0) -> nn.Module:
    """Give every parameter and running statistic random values: zeros and ones of an initialization hide errors.

    A deviation of 0.25 keeps attention from looking at one place alone.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, deviation)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, deviation)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


class Residual(nn.Module):
    """A convolution with a batch norm, one whose result is added to its input, and a linear layer behind the mean."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.body, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = x + torch.relu(self.body(x))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


def net(forward: Callable[..., Any], **parts: nn.Module | Tensor) -> nn.Module:
    """Make a module of parts with random parameters; tensors become parameters. ``forward`` is its method."""

    made: nn.Module = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
    return randomized(made)


def captured(model: nn.Module, *inputs: Any, dynamic: Any = None) -> fxopt.CapturedModule:
    """Capture in evaluation; ``dynamic`` as for :func:`fxopt.capture`, by position."""
    return fxopt.capture(model, inputs, dynamic_shapes=dynamic, modes="current", verify=False)


def zero_groups(gm: fxopt.CapturedModule, groups: Sequence[Group]) -> None:
    """Set the parameters of groups to 0 in place."""
    with torch.no_grad():
        for part in (part for group in groups for part in group.parts):
            tensor = get_path(gm, part.name)
            if isinstance(tensor, nn.Parameter):
                tensor.index_fill_(part.dim, torch.tensor(part.places), 0.0)


def every_other(families: Sequence[Family]) -> list[Group]:
    """Return every other group of each family, never all of one."""
    return [group for family in families for group in family.groups[1::2]]


@dataclasses.dataclass
class Shrunk:
    """A masked graph and the shrunk one, whose results are equal."""

    masked: fxopt.CapturedModule
    gm: fxopt.CapturedModule
    families: list[Family]
    removal: Removal

    @property
    def kept(self) -> float:
        """The share of the parameters that is left."""
        return sum(p.numel() for p in self.gm.parameters()) / sum(p.numel() for p in self.masked.parameters())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter or buffer afterwards."""
        return tuple(get_path(self.gm, name).shape)

    def reasons(self, name: str, dim: int = 0) -> set[str]:
        """Why the indices of an axis of a parameter stay: the reasons, without the nodes that they are about."""
        node = next(n for n in self.masked.graph.nodes if n.op == "get_attr" and n.target == name)
        axis = self.removal.structure.axis(node, dim)
        assert axis is not None
        return {reason for _, reason in self.removal.reasons(axis)}


def shrink(
    gm: fxopt.CapturedModule,
    *inputs: Any,
    prefer: Literal["longest", "heads"] = "longest",
    may_be_constant: bool = False,
) -> Shrunk:
    """Shrink a graph as it is, and compare; its results have to depend on something unless they may be constant."""
    structure = Structure(gm)
    removal = Removal(structure, Constants(structure))
    after = ShrinkMasked(random_masks=0)(gm).gm
    verify(after)
    assert_equal(gm, after, *inputs, may_be_constant=may_be_constant)
    dead = any("all of its axis could go" in reason for _, reason in removal.kept_for.values())
    if not dead:  # else which index stays for that reason alone is another one the second time
        assert not ShrinkMasked(random_masks=0)(after).modified
    return Shrunk(gm, after, families_of(structure, prefer=prefer), removal)


def shrunk(
    model: nn.Module,
    *inputs: Any,
    dynamic: Any = None,
    prefer: Literal["longest", "heads"] = "longest",
    choose: Callable[[Sequence[Family]], list[Group]] = every_other,
    onnx: bool = False,
) -> Shrunk:
    """Set some groups of a net to 0, shrink it, and check that the same is computed and that all of them are gone.

    Args:
        model: The net.
        inputs: What to run it on, besides random inputs of the same sizes.
        dynamic: Which sizes are dynamic, as for :func:`fxopt.capture`.
        prefer: As for :func:`families_of`.
        choose: Which groups are set to 0.
        onnx: Compare with ONNX Runtime as well, its optimizer off and on.
    """
    gm = captured(model, *inputs, dynamic=dynamic)
    families = families_of(Structure(gm), prefer=prefer)
    groups = choose(families)
    assert groups, "there is nothing to prune"
    zero_groups(gm, groups)
    found = shrink(gm, *inputs, prefer=prefer)
    gone: dict[tuple[str, int], set[int]] = {}
    for part in (part for group in groups for part in group.parts):
        gone.setdefault((part.name, part.dim), set()).update(part.places)
    for (name, dim), places in gone.items():
        want = get_path(gm, name).shape[dim] - len(places)
        assert found.shape(name)[dim] == want, f"{name} is {found.shape(name)}; wanted {want} along {dim}"
    if onnx:
        prove_in_ort(found.gm)
    found.families = families
    return found


def prove_in_ort(gm: fxopt.CapturedModule) -> None:
    """Export a graph and compare it with ORT, its optimizer off and on, in every case that the validator has."""
    file = to_onnx(gm)
    assert file.validation is not None
    assert file.validation.runs == 2 * len({result.case for result in file.validation.results})


def assert_equal(
    masked: fxopt.CapturedModule, after: fxopt.CapturedModule, *inputs: Any, may_be_constant: bool = False
) -> None:
    """Check that two graphs compute the same, up to rounding, on inputs and on random ones of their sizes."""
    again = [torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    for given in (inputs, again):
        with torch.no_grad():
            want, got = (torch.utils._pytree.tree_leaves(gm(*given)) for gm in (masked, after))
        assert len(want) == len(got)
        for first, second in zip(want, got, strict=True):
            assert first.shape == second.shape
            assert first.dtype == second.dtype
            bound = 1e-9 if first.dtype == torch.float64 else 2e-5  # sums of tens of terms, in another order
            torch.testing.assert_close(second, first, rtol=0, atol=bound * float(first.abs().max()))
            assert may_be_constant or first.numel() == 1 or first.unique().numel() > 1, (
                "a constant result compares nothing"
            )
