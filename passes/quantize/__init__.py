"""Passes on precision: integers in place of floats."""

from fxopt.pass_base import Pass
from fxopt.passes.quantize.adaround import AdaRound
from fxopt.passes.quantize.correct_bias import CorrectBias
from fxopt.passes.quantize.equalize_channels import EqualizeChannels
from fxopt.passes.quantize.gptq import Gptq
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.lower_for_integers import LowerForIntegers
from fxopt.passes.quantize.quantize import Quantize
from fxopt.passes.quantize.sink_constants import SinkConstants
from fxopt.passes.quantize.smooth_quant import SmoothQuant
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.split_outliers import SplitOutliers

PASSES: tuple[type[Pass], ...] = (
    AdaRound,
    CorrectBias,
    EqualizeChannels,
    Gptq,
    InsertQdq,
    LowerForIntegers,
    Quantize,
    SinkConstants,
    SmoothQuant,
    SplitOutliers,
)

__all__ = [
    "PASSES",
    "AdaRound",
    "CorrectBias",
    "EqualizeChannels",
    "Gptq",
    "InsertQdq",
    "LowerForIntegers",
    "QuantPlan",
    "QuantSpec",
    "Quantize",
    "SinkConstants",
    "SmoothQuant",
    "SplitOutliers",
]
