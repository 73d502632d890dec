"""Whatever is masked in whatever net: the shrunk graph computes the same."""

import random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fxopt.passes.prune.constants import Constants
from fxopt.passes.prune.groups import families_of
from fxopt.passes.prune.removal import Removal
from fxopt.passes.prune.structure import Structure
from tests.passes.prune.nets import captured, shrink, zero_groups
from tests.passes.prune.random_nets import FUNCTIONS, LAYERS, PROGRAMS, Program

SEEDS = st.integers(0, 999)
# A program is a few lines as it is, and a smaller one takes minutes to find.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def graph_of(program):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    return captured(program.build(), x, dynamic=({0: "n"},)), x


def check_groups(program, seed, prefer):
    """Zero a random subset of the groups that are offered."""
    gm, x = graph_of(program)
    draw = random.Random(seed)
    families = families_of(Structure(gm), prefer=prefer)
    groups = [g for f in families for g in draw.sample(f.groups, draw.randrange(len(f.groups)))]
    zero_groups(gm, groups)
    found = shrink(gm, x, prefer=prefer, may_be_constant=True)
    for group in groups:
        assert found.removal.removed(group.indices).all() or found.removal.reasons(group.indices), group


def check_elements(program, seed):
    """Zero random slices of random axes, and random elements, of parameters."""
    gm, x = graph_of(program)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gm.parameters():
            for dim, size in enumerate(parameter.shape):
                if torch.rand((), generator=draw) < 0.5:
                    slices = torch.rand(size, generator=draw) < 0.4
                    parameter.index_fill_(dim, slices.nonzero().flatten(), 0.0)
            if torch.rand((), generator=draw) < 0.3:
                parameter.mul_(torch.rand(parameter.shape, generator=draw) < 0.3)
    shrink(gm, x, may_be_constant=True)


@settings(max_examples=8, phases=PHASES)
@given(PROGRAMS, SEEDS, st.sampled_from(["longest", "heads"]))
def test_random_groups(program, seed, prefer):
    check_groups(program, seed, prefer)


@settings(max_examples=8, phases=PHASES)
@given(PROGRAMS, SEEDS)
def test_random_elements(program, seed):
    check_elements(program, seed)


@pytest.mark.slow
@settings(max_examples=200, phases=PHASES)
@given(PROGRAMS, SEEDS, st.sampled_from(["longest", "heads"]))
def test_random_groups_of_many_nets(program, seed, prefer):
    check_groups(program, seed, prefer)


@pytest.mark.slow
@settings(max_examples=200, phases=PHASES)
@given(PROGRAMS, SEEDS)
def test_random_elements_of_many_nets(program, seed):
    check_elements(program, seed)


@pytest.mark.parametrize("kind", [*LAYERS, *FUNCTIONS])
def test_every_group_that_is_offered_can_go_or_there_is_a_reason(kind):
    gm = graph_of(Program((("conv", 0, 0), (kind, 0, 1), ("relu", 0, 0)), 1))[0]
    families = families_of(Structure(gm))
    assert families
    for family in families:
        masked = gm.clone()
        zero_groups(masked, family.groups[:1])
        structure = Structure(masked)
        removal = Removal(structure, Constants(structure))
        indices = family.groups[0].indices
        assert removal.removed(indices).all() or removal.reasons(indices), family.name
