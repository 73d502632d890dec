"""Passes on precision: integers in place of floats."""

from fxopt.pass_base import Pass
from fxopt.passes.quantize.adaround import AdaRound
from fxopt.passes.quantize.binarize import BinarizeWeights
from fxopt.passes.quantize.codebook import CodebookWeights
from fxopt.passes.quantize.compose_layers import ComposeLayers
from fxopt.passes.quantize.convert_qat import ConvertQat
from fxopt.passes.quantize.correct_bias import CorrectBias
from fxopt.passes.quantize.equalize_channels import EqualizeChannels
from fxopt.passes.quantize.gptq import Gptq
from fxopt.passes.quantize.insert_qdq import InsertQdq
from fxopt.passes.quantize.lower_for_integers import LowerForIntegers
from fxopt.passes.quantize.prepare_qat import PrepareQat
from fxopt.passes.quantize.quantize import Quantize
from fxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from fxopt.passes.quantize.sink_constants import SinkConstants
from fxopt.passes.quantize.smooth_quant import SmoothQuant
from fxopt.passes.quantize.spec import QuantPlan, QuantSpec
from fxopt.passes.quantize.split_outliers import SplitOutliers
from fxopt.passes.quantize.weight_only import QuantizeWeights

PASSES: tuple[type[Pass], ...] = (
    AdaRound,
    BinarizeWeights,
    CodebookWeights,
    ComposeLayers,
    ConvertQat,
    CorrectBias,
    EqualizeChannels,
    Gptq,
    InsertQdq,
    LowerForIntegers,
    PrepareQat,
    Quantize,
    QuantizeDynamic,
    QuantizeWeights,
    SinkConstants,
    SmoothQuant,
    SplitOutliers,
)

__all__ = [
    "PASSES",
    "AdaRound",
    "BinarizeWeights",
    "CodebookWeights",
    "ComposeLayers",
    "ConvertQat",
    "CorrectBias",
    "EqualizeChannels",
    "Gptq",
    "InsertQdq",
    "LowerForIntegers",
    "PrepareQat",
    "QuantPlan",
    "QuantSpec",
    "Quantize",
    "QuantizeDynamic",
    "QuantizeWeights",
    "SinkConstants",
    "SmoothQuant",
    "SplitOutliers",
]
