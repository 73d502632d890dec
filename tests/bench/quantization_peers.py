"""The tools that ``tests/bench/quantization.py`` compares: each is a function from a net and its data to an ONNX file.

    quantize(model, batches, example, dynamic_shapes, path) -> None

``TOOLS`` lists them. Each has the settings that its documentation gives as the first choice, and 64 samples. Tools for
ONNX files start from fxopt's f32 export, tools for torch graphs from ``torch.export`` and end in ``torch.onnx.export``.
NNCF is made for OpenVINO and the PT2E quantizer here for Inductor: this is what they give someone who runs ORT.
Written against nncf 3.4.0 and torchao 0.18.0 on torch 2.14.1, onnxruntime 1.32.0, onnxscript 0.7.2.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
import fxopt.passes
from fxopt.export import Session, to_onnx
from fxopt.passes.quantize.recipe import Recipe
from tests.zoo.real import Batch

Quantize = Callable[[nn.Module, Sequence[Batch], Batch, dict[str, Any], Path], None]


@dataclasses.dataclass(frozen=True)
class Tool:
    """A column of the table.

    Attributes:
        title: Its head.
        quantize: Makes the file.
        needs: The packages that it imports, besides those of fxopt.
        transformers_only: It has nothing to offer for convolutions.
    """

    title: str
    quantize: Quantize
    needs: tuple[str, ...] = ()
    transformers_only: bool = False


def fp32(
    model: nn.Module, batches: Sequence[Batch], example: Batch, dynamic_shapes: dict[str, Any], path: Path
) -> None:
    """Export as it is, after fxopt's default passes."""
    gm = fxopt.optimize(model, None, example, dynamic_shapes=dynamic_shapes, modes="current", check="off")
    to_onnx(gm, path, validate=False)


def with_fxopt(
    model: nn.Module,
    batches: Sequence[Batch],
    example: Batch,
    dynamic_shapes: dict[str, Any],
    path: Path,
    recipe: Recipe = "auto",
    no_saturation: bool = True,
) -> None:
    """Quantize with fxopt's own pass."""
    gm = fxopt.optimize(
        model,
        passes=[*fxopt.passes.DEFAULT, fxopt.passes.Quantize(recipe=recipe, no_saturation=no_saturation)],
        modes="current",  # the peers trace evaluation alone, too
        example_inputs=example,
        dynamic_shapes=dynamic_shapes,
        calibration=batches,
        check="samples",
    )
    to_onnx(gm, path, validate=False)


def _ort_static(**options: Any) -> Quantize:
    """Return ORT's ``quantize_static``: QDQ, a scale per output channel, ranges by minimum and maximum."""

    def quantize(
        model: nn.Module, batches: Sequence[Batch], example: Batch, dynamic_shapes: dict[str, Any], path: Path
    ) -> None:
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):
            def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
                self.rows = rows

            def get_next(self) -> dict[str, Any] | None:
                return next(self.rows, None)

        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "fp32.onnx"
            fp32(model, batches, example, dynamic_shapes, plain)
            prepared = _prepared(plain)
            rows = iter(_named(plain, batches))
            quantization.quantize_static(prepared, path, Reader(rows), per_channel=True, **options)

    return quantize


def _ort_static_u8(*arguments: Any) -> None:
    """Quantize with activations in uint8 in place of ORT's default int8: some kernels exist for these alone."""
    from onnxruntime.quantization import QuantType

    _ort_static(activation_type=QuantType.QUInt8)(*arguments)


def _ort_static_7bit(*arguments: Any) -> None:
    """Quantize weights to 7 bits, as ORT advises for CPUs without VNNI, whose sums in int16 cannot overflow then."""
    from onnxruntime.quantization import QuantType

    _ort_static(activation_type=QuantType.QUInt8, reduce_range=True)(*arguments)


def ort_dynamic(
    model: nn.Module, batches: Sequence[Batch], example: Batch, dynamic_shapes: dict[str, Any], path: Path
) -> None:
    """Quantize with ORT's ``quantize_dynamic``: activations get their scales as they come, so no sample is needed."""
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "fp32.onnx"
        fp32(model, batches, example, dynamic_shapes, plain)
        quantization.quantize_dynamic(_prepared(plain), path, per_channel=True)


def nncf_onnx(
    model: nn.Module, batches: Sequence[Batch], example: Batch, dynamic_shapes: dict[str, Any], path: Path
) -> None:
    """Quantize the ONNX file with NNCF."""
    import nncf
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "fp32.onnx"
        fp32(model, batches, example, dynamic_shapes, plain)
        dataset = nncf.Dataset(_named(plain, batches))
        quantized = nncf.quantize(onnx.load(plain), dataset, subset_size=len(batches), model_type=_nncf_type(model))
    onnx.save(quantized, path)


def nncf_fx(
    model: nn.Module, batches: Sequence[Batch], example: Batch, dynamic_shapes: dict[str, Any], path: Path
) -> None:
    """Quantize the graph of ``torch.export`` with NNCF, and export it with torch."""
    import nncf

    gm = _torch_graph(model, example, torch_dims(dynamic_shapes) or None)
    dataset = nncf.Dataset([batch if len(batch) > 1 else batch[0] for batch in batches])
    quantized = nncf.quantize(gm, dataset, subset_size=len(batches), model_type=_nncf_type(model))
    _torch_onnx(quantized, example, dynamic_shapes, path)


def pt2e(
    model: nn.Module, batches: Sequence[Batch], example: Batch, dynamic_shapes: dict[str, Any], path: Path
) -> None:
    """Quantize with torchao's PT2E flow and its quantizer for x86, and export with torch."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer

    gm = _torch_graph(model, example, torch_dims(dynamic_shapes) or None)
    quantizer = x86_inductor_quantizer.X86InductorQuantizer()
    quantizer.set_global(x86_inductor_quantizer.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(gm, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(*batch)
    _torch_onnx(convert_pt2e(prepared), example, dynamic_shapes, path)


def _prepared(plain: Path) -> Path:
    """Run what ORT asks for before its quantizers, and return the file that it writes."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = plain.with_name("prepared.onnx")
    # The file has every shape; ORT's inference in Python would end in an AssertionError at a Pad with axes (opset 18).
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    return prepared


def _named(path: Path, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Return the batches as ORT takes them: arrays by the names of the file's inputs."""
    names = Session(path).input_names
    return [{name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)} for batch in batches]


def _nncf_type(model: nn.Module) -> Any:
    import nncf

    has_layer_norm = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    return nncf.ModelType.TRANSFORMER if has_layer_norm else None


def _torch_graph(model: nn.Module, example: Batch, dims: dict[str, Any] | None) -> torch.fx.GraphModule:
    return torch.export.export(model, example, dynamic_shapes=dims).module(check_guards=False)


def _torch_onnx(gm: nn.Module, example: Batch, dynamic_shapes: dict[str, Any], path: Path) -> None:
    dims = tuple(torch_dims(dynamic_shapes).values()) or None  # by position: the tools do not keep the inputs' names
    program = torch.export.export(gm, example, dynamic_shapes=dims)
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)


def torch_dims(dynamic_shapes: dict[str, Any]) -> dict[str, Any]:
    """Translate {"x": {1: "length<=512"}} for ``torch.export``; equal names become one ``Dim``."""
    dims: dict[str, Any] = {}

    def dim(text: str) -> Any:
        name, _, greatest = text.partition("<=")
        return dims.setdefault(name, torch.export.Dim(name, max=int(greatest) if greatest else None))

    return {name: {axis: dim(text) for axis, text in axes.items()} for name, axes in dynamic_shapes.items()}


TOOLS: dict[str, Tool] = {
    "fp32": Tool("fp32", fp32),
    "ort_static": Tool("ORT quantize_static", _ort_static()),
    "ort_static_u8": Tool("ORT quantize_static, uint8 activations", _ort_static_u8),
    "ort_static_7bit": Tool("ORT quantize_static, uint8 activations, reduce_range", _ort_static_7bit),
    "ort_dynamic": Tool("ORT quantize_dynamic", ort_dynamic, transformers_only=True),
    "nncf_onnx": Tool("NNCF on ONNX", nncf_onnx, ("nncf",)),
    "nncf_fx": Tool("NNCF on FX → torch.onnx", nncf_fx, ("nncf",)),
    "pt2e": Tool("PT2E (x86 Inductor) → torch.onnx", pt2e, ("torchao",)),
    "fxopt": Tool("fxopt", with_fxopt),
    "fxopt_accurate": Tool("fxopt, accurate", functools.partial(with_fxopt, recipe="accurate")),
}
