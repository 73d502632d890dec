"""Small nets for the tests of every room, one for each thing that captures, passes and exports get wrong.

``NETS`` has them all by name. A net has ``example(batch)``: an ``Example`` of inputs with both signs and some
repetition in them, and the dimensions that may vary. Weights follow the seed that tests/conftest.py sets. BatchNorm
statistics are never the initial zeros and ones, with which a wrong fold goes unnoticed.
"""

from tests.models.base import Example, Net, has_batch_norm, settle
from tests.models.sequence import Dlrm, FrameworkEncoder, GruNet, LstmNet, MaskedEncoder, MiniViT, Mlp, TiedLm
from tests.models.unusual import (
    DictOutput,
    IntegerNet,
    KeywordOnly,
    MixedDtype,
    NestedInputs,
    Noise,
    Redundant,
    RunningMean,
    SliceWriter,
    StochasticDepth,
)
from tests.models.vision import (
    BnConv,
    ChannelShuffle,
    Conv1d,
    Conv3d,
    ConvBnRelu,
    Depthwise,
    GroupedConv,
    LinearBn,
    PixelShuffle,
    Residual,
    SameConvBn,
    SharedConv,
    SqueezeExcite,
    TransposedConvBn,
    UNet,
)

NETS: dict[str, type[Net]] = {
    net.__name__: net
    for net in (
        ConvBnRelu,
        Depthwise,
        GroupedConv,
        TransposedConvBn,
        LinearBn,
        SameConvBn,
        BnConv,
        Conv3d,
        Conv1d,
        Residual,
        SharedConv,
        SqueezeExcite,
        UNet,
        PixelShuffle,
        ChannelShuffle,
        Mlp,
        MiniViT,
        MaskedEncoder,
        FrameworkEncoder,
        TiedLm,
        LstmNet,
        GruNet,
        Dlrm,
        DictOutput,
        KeywordOnly,
        NestedInputs,
        SliceWriter,
        StochasticDepth,
        RunningMean,
        IntegerNet,
        MixedDtype,
        Redundant,
        Noise,
    )
}

RANDOM_IN_EVAL = frozenset({"Noise"})  # their outputs cannot be compared with a second eager run

__all__ = [
    "NETS",
    "RANDOM_IN_EVAL",
    "BnConv",
    "ChannelShuffle",
    "Conv1d",
    "Conv3d",
    "ConvBnRelu",
    "Depthwise",
    "DictOutput",
    "Dlrm",
    "Example",
    "FrameworkEncoder",
    "GroupedConv",
    "GruNet",
    "IntegerNet",
    "KeywordOnly",
    "LinearBn",
    "LstmNet",
    "MaskedEncoder",
    "MiniViT",
    "MixedDtype",
    "Mlp",
    "NestedInputs",
    "Net",
    "Noise",
    "PixelShuffle",
    "Redundant",
    "Residual",
    "RunningMean",
    "SameConvBn",
    "SharedConv",
    "SliceWriter",
    "SqueezeExcite",
    "StochasticDepth",
    "TiedLm",
    "TransposedConvBn",
    "UNet",
    "has_batch_norm",
    "settle",
]
