"""Pruning: masks in the graph, and a smaller graph that computes the same."""

from fxopt.pass_base import Pass
from fxopt.passes.prune.bake_masks import BakeMasks
from fxopt.passes.prune.insert_masks import InsertMasks
from fxopt.passes.prune.masks import MaskPlan
from fxopt.passes.prune.prune import Prune
from fxopt.passes.prune.pruner import Pruner, fine_tune
from fxopt.passes.prune.schedule import Cubic, Iterative, OneShot
from fxopt.passes.prune.shrink_masked import ShrinkMasked

PASSES: tuple[type[Pass], ...] = (Prune, InsertMasks, BakeMasks, ShrinkMasked)

__all__ = [
    "PASSES",
    "BakeMasks",
    "Cubic",
    "InsertMasks",
    "Iterative",
    "MaskPlan",
    "OneShot",
    "Prune",
    "Pruner",
    "ShrinkMasked",
    "fine_tune",
]
