"""Passes on branches: which sides stay, what they share, and what a branch costs."""

from fxopt.pass_base import Pass
from fxopt.passes.branches.branches_to_select import BranchesToSelect
from fxopt.passes.branches.dispatch import Dispatch
from fxopt.passes.branches.profile import BranchCount, BranchProfile, profile_branches
from fxopt.passes.branches.simplify_branches import SimplifyBranches
from fxopt.passes.branches.specialize_branches import SpecializeBranches

PASSES: tuple[type[Pass], ...] = (BranchesToSelect, Dispatch, SimplifyBranches, SpecializeBranches)

__all__ = [
    "PASSES",
    "BranchCount",
    "BranchProfile",
    "BranchesToSelect",
    "Dispatch",
    "SimplifyBranches",
    "SpecializeBranches",
    "profile_branches",
]
