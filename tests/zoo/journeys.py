"""The whole way of one model, from capture to a proven file, with the time of each step.

Every model of the zoo that has a structure of its own goes this way in ``test_journeys.py`` and in
``tests/bench/zoo_table.py``. ``SMALL`` has nets of torchvision's own classes with fewer and thinner layers: they keep
each kind of operator, and take seconds.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import onnx_ir as ir
from torch import nn
from torchvision.models import densenet, swin_transformer, vision_transformer

import fxopt
from fxopt.export import OnnxFile, ValidationReport, to_onnx, validate
from tests.models import NETS
from tests.zoo import architectures
from tests.zoo.architectures import CLASSIFIERS, SEGMENTERS, TRANSFORMERS, Built

RECURRENT = ("LstmNet", "GruNet")
RECOMMENDERS = ("Dlrm",)
NAMES = (*CLASSIFIERS, *SEGMENTERS, *TRANSFORMERS, *RECURRENT, *RECOMMENDERS)


def _densenet() -> nn.Module:
    return densenet.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=20)


def _swin() -> nn.Module:
    """Two stages of a plain and a shifted window; the 16 x 16 patches are padded to fill windows of 7."""
    return swin_transformer.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7], num_classes=20)


def _vit() -> nn.Module:
    return vision_transformer.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=20)


SMALL: dict[str, Callable[[], nn.Module]] = {"densenet_small": _densenet, "swin_small": _swin, "vit_small": _vit}


@dataclasses.dataclass(frozen=True)
class Journey:
    """What came out at each station, and how long each step took.

    Attributes:
        captured: The graph as it was captured.
        optimized: The graph after the default passes.
        file: The ONNX model.
        validation: The comparison of ORT with eager.
        seconds: Of "capture", "optimize", "export" and "validate".
    """

    captured: fxopt.CapturedModule
    optimized: fxopt.CapturedModule
    file: OnnxFile
    validation: ValidationReport
    seconds: dict[str, float]

    @property
    def nodes(self) -> tuple[int, int, int]:
        """Nodes of the captured graph, of the optimized graph and of the ONNX graph."""
        return (len(self.captured.graph.nodes), len(self.optimized.graph.nodes), node_count(self.file.model))


def node_count(model: ir.Model) -> int:
    """Return the number of nodes of an ONNX model's main graph, and of the branches and functions in it."""
    graphs = (model.graph, *model.functions.values())
    return sum(1 for graph in graphs for _ in ir.traversal.RecursiveGraphIterator(graph))


def build(name: str, batch: int = 2) -> Built:
    """Build a model of ``NAMES`` or ``SMALL``."""
    if name in NETS:
        net = NETS[name]().eval()
        example = net.example(batch)
        return Built(net, example.args, example.kwargs, example.dynamic_shapes or {})
    if name in SMALL:
        model = SMALL[name]().eval()
        architectures._wake(model, 64)
        return Built(model, (architectures._images(batch, 64),), {}, {"x": {0: "batch"}})
    return architectures.build(name, batch=batch)


def travel(built: Built) -> Journey:
    """Capture a model, run the default passes, export the result and compare it with ORT.

    Raises:
        FxoptError: a step fails, or a pass has to be undone, or ORT differs by more than rounding.
    """
    seconds: dict[str, float] = {}
    sample = fxopt.Sample(built.args, built.kwargs)
    with _timed(seconds, "capture"):
        captured = fxopt.capture(built.model, sample, dynamic_shapes=built.dynamic_shapes)
    with _timed(seconds, "optimize"):
        optimized = fxopt.optimize(captured, strict=True)
    with _timed(seconds, "export"):
        file = to_onnx(optimized, validate=False)
    with _timed(seconds, "validate"):
        validation = validate(file, optimized)
    return Journey(captured, optimized, file, validation, seconds)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started
