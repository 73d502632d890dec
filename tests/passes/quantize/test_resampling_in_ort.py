"""Nets that resample between quantized layers, in ORT with its optimizer off and on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, optimized_model, to_onnx
from fxopt.numerics import measure
from fxopt.passes import ConvertQat, PrepareQat, Quantize
from tests.models.base import settle

pytestmark = pytest.mark.ort

IMAGE = torch.randn(2, 3, 16, 12)


class UNet(nn.Module):
    """Down by a pool, up again by a factor or to the size of the skip, and both to the head."""

    def __init__(self, mode: str, up: str) -> None:
        super().__init__()
        self.mode, self.up = mode, up
        self.skip, self.low = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.joined, self.head = nn.Conv2d(14, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        settle(self)

    def forward(self, image: Tensor) -> Tensor:
        skip = F.relu(self.skip(image))
        low = F.relu(self.low(F.max_pool2d(skip, 2)))
        size = {"scale_factor": 2.0} if self.up == "factor" else {"size": skip.shape[2:]}
        low = F.interpolate(low, mode=self.mode, **size)  # type: ignore[arg-type]  # the one or the other
        return self.head(F.relu(self.joined(torch.cat([low, skip], 1))))


def kernels(graph: fxopt.CapturedModule) -> Counter[str]:
    """Compare the file with the graph, optimizer off and on, and return ORT's kernels."""
    model = to_onnx(graph, contract=fxopt.Contract.lossy("sqnr_db", 30.0)).to_bytes()
    other = torch.randn(3, *IMAGE.shape[1:])
    for level in ("none", "all"):
        (got,) = Session(model, optimization=level).run([other])  # type: ignore[arg-type]  # two of its texts
        assert measure(graph(other).detach(), got).sqnr_db > 30
    return Counter(node.op_type for node in optimized_model(model).graph)


@pytest.mark.parametrize("up", ["factor", "size"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("axes", [{0: "batch"}, {0: "batch", 2: "height", 3: "width"}], ids=["batch", "all"])
def test_a_unet_after_quantize(mode: str, up: str, axes: dict[int, str]) -> None:
    shapes = {"image": {axis: name if axis == 0 else torch.export.Dim.AUTO for axis, name in axes.items()}}
    small = fxopt.optimize(UNet(mode, up).eval(), [Quantize(recipe="fast")], IMAGE, dynamic_shapes=shapes, strict=True)
    kinds = kernels(small)
    assert (kinds["QLinearConv"], kinds["Conv"], kinds["QLinearConcat"]) == (4, 0, 1)


def test_nearest_resizes_the_integers_themselves() -> None:
    small = fxopt.optimize(UNet("nearest", "size").eval(), [Quantize(recipe="fast")], IMAGE, strict=True)
    model = optimized_model(to_onnx(small, contract=fxopt.Contract.lossy("sqnr_db", 30.0)).to_bytes())
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Resize"] == 1
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (1, 1)  # of the input and of the output


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_unet_after_training_with_quantizers(mode: str) -> None:
    gm = fxopt.capture(UNet(mode, "size").train(), IMAGE, dynamic_shapes={"image": {0: "batch"}})
    graph = fxopt.optimize(gm, [PrepareQat()], strict=True).train()
    optimizer = torch.optim.SGD(graph.parameters(), lr=1e-3)
    graph(IMAGE).square().mean().backward()
    optimizer.step()
    kinds = kernels(fxopt.optimize(graph.eval(), [ConvertQat()], strict=True))
    assert (kinds["QLinearConv"], kinds["Conv"]) == (4, 0)
