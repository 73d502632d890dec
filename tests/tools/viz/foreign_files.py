"""ONNX models as others write them, each small: control flow, functions, odd names, odd types, weights elsewhere."""

import pathlib
from collections.abc import Callable

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from torch import nn

HEADER = '<ir_version: 10, opset_import: ["" : 21{}]>\n'

TEXTS = {
    "add": "main (float[n, 3] x, float[3] y) => (float[n, 3] z) { z = Add(x, y) }",
    "no nodes": "main (float[2] x) => (float[2] x) { }",
    "returns a weight": "main (float[2] x) => (float[2] w) <float[2] w = {1.0, 2.0}> { }",
    "dead output": "main (float[4, 2] x) => (float[2, 2] a) { a, b = Split <axis = 0, num_outputs = 2> (x) }",
    "optional inputs": "main (float[4] x) => (float[4] y) <float hi = {1.0}> { y = Clip(x, , hi) }",
    "two results of one": "main (float[3, 4] x) => (float[n, 4] v, int64[n, 4] i) <int64[1] k = {2}> "
    "{ v, i = TopK <axis = 0> (x, k) }",
    "if": "main (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = yes () => (float[2] a) "
    "{ t = Relu(x) a = Neg(t) }, else_branch = no () => (float[2] b) { b = Abs(x) }> }",
    "if in if": "main (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = yes () => (float[2] a) "
    "{ a = If (c) <then_branch = in1 () => (float[2] p) { p = Relu(x) }, else_branch = in2 () => (float[2] q) "
    "{ q = Neg(x) }> }, else_branch = no () => (float[2] b) { b = Abs(x) }> }",
    "loop": "main (int64 n, float[2] x) => (float[2] y) <bool go = {1}> { y = Loop (n, go, x) <body = b "
    "(int64 i, bool c, float[2] s) => (bool d, float[2] t) { d = Identity(c) t = Add(s, x) }> }",
    "scan": "main (float[5, 2] x, float[2] s) => (float[2] y, float[5, 2] z) { y, z = Scan <num_scan_inputs = 1, "
    "body = b (float[2] a, float[2] e) => (float[2] f, float[2] g) { f = Add(a, e) g = Relu(f) }> (s, x) }",
    "constant nodes": "main (float[2] x) => (float[2] y) "
    "{ c = Constant <value = float[2] {1.0, 0.0}> () y = Mul(x, c) }",
    "unknown domain": "main (float[2] x) => (float[2] y) { t = my.own.Mystery <level = 3> (x) y = Relu(t) }",
    "sequence": "main (float[2] x, float[2] y) => (float[2] z) <int64 at = {1}> "
    "{ s = SequenceConstruct(x, y) z = SequenceAt(s, at) }",
    "strings": "main (string[2] x) => (string[2] y) { y = StringConcat(x, x) }",
    "scalars and empty": "main (float[0, 3] x) => (float[0, 3] y) <float s = {2.0}> { y = Mul(x, s) }",
}
FUNCTIONS = {
    "function": "main (float[2, 3] x, float[3, 3] w) => (float[2, 3] y) { y = my.Dense(x, w) }\n"
    '<domain: "my", opset_import: ["" : 21]> Dense (a, b) => (c) { t = MatMul(a, b) c = Relu(t) }',
    "function in function": "main (float[2] x) => (float[2] y) { t = my.Outer(x) y = my.Outer(t) }\n"
    '<domain: "my", opset_import: ["" : 21, "my" : 1]> Outer (a) => (b) { t = my.Inner(a) b = my.Inner(t) }\n'
    '<domain: "my", opset_import: ["" : 21]> Inner (a) => (b) { b = Relu(a) }',
    "function with attribute": "main (float[2] x) => (float[2] y) { y = my.Leaky <slope = 0.5> (x) }\n"
    '<domain: "my", opset_import: ["" : 21]> Leaky <slope> (a) => (b) { b = LeakyRelu <alpha : float = @slope> (a) }',
}


def parsed(text: str, imports: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(HEADER.format(imports) + text)


def small_net() -> onnx.ModelProto:
    """A model of a convolution and a matrix product, with weights, without names of nodes."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(4, 3, 3, 3)), "b": rng.normal(size=4), "m": rng.normal(size=(4, 5)),
    }  # fmt: skip
    model = parsed(
        "main (float[1, 3, 8, 8] x) => (float[1, 5] y) { c = Conv(x, w, b) r = Relu(c) g = GlobalAveragePool(r) "
        "f = Flatten(g) y = MatMul(f, m) }"
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(held.astype(np.float32), name) for name, held in weights.items()
    )
    return model


def named(names: list[str]) -> onnx.ModelProto:
    model = small_net()
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    return model


def odd_types() -> onnx.ModelProto:
    """Weights of types that numpy does not know."""
    model = parsed("main (float[4] x) => (float[4] y) { y = Relu(x) }")
    for kind in ("BFLOAT16", "FLOAT16", "FLOAT8E4M3FN", "INT4", "UINT4", "UINT16", "BOOL"):
        tensor = helper.make_tensor(kind.lower(), getattr(TensorProto, kind), [4], [0, 1, 1, 0])
        model.graph.initializer.append(tensor)
        kwargs = {"to": TensorProto.FLOAT}
        model.graph.node.append(helper.make_node("Cast", [kind.lower()], [f"{kind} as float"], **kwargs))
    return model


def default_inputs() -> onnx.ModelProto:
    """A weight that is an input as well, as files of IR version 3 have."""
    model = small_net()
    model.graph.input.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [4, 5]))
    return model


def external(folder: pathlib.Path, *, lost: bool) -> pathlib.Path:
    path = folder / ("lost.onnx" if lost else "external.onnx")
    onnx.save(small_net(), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    if lost:
        (folder / f"{path.name}.data").unlink()
    return path


class _Data(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"x": np.random.default_rng(i).normal(size=(1, 3, 8, 8)).astype(np.float32)} for i in range(2)]

    def get_next(self):
        return self.left.pop() if self.left else None


def quantized(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """Let ORT quantize the small net."""
    source, target = folder / "float.onnx", folder / f"{kind}.onnx"
    onnx.save(small_net(), source)
    if kind == "dynamic":
        quantization.quantize_dynamic(source, target)
    else:
        form = getattr(quantization.QuantFormat, kind)
        # 7 bits: with 8, sums of CPUs without VNNI overflow, and the file computes something else there.
        quantization.quantize_static(source, target, _Data(), quant_format=form, reduce_range=True)
    return target


def optimized(folder: pathlib.Path) -> pathlib.Path:
    """Let ORT write what it runs: fused kernels of its own domain."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(small_net().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return folder / "optimized.onnx"


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.second(self.first(x))


def by_torch(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "torch.onnx"
    torch.onnx.export(TwoLayers().eval(), (torch.randn(2, 4),), path, dynamo=True, verbose=False)
    return path


MADE: dict[str, Callable[[pathlib.Path], onnx.ModelProto | pathlib.Path]] = {
    "weights": lambda folder: small_net(),
    "names with slashes": lambda folder: named([f"/layer1/conv{i}/Op" for i in range(5)]),
    "equal names": lambda folder: named(["same"] * 5),
    "odd names": lambda folder: named(["</script><script>alert(1)</script>", '"', "\\", "a\nb", "\u2028é漢"]),
    "odd types": lambda folder: odd_types(),
    "default inputs": lambda folder: default_inputs(),
    "external data": lambda folder: external(folder, lost=False),
    "lost data": lambda folder: external(folder, lost=True),
    "quantized dynamic": lambda folder: quantized(folder, "dynamic"),
    "quantized QDQ": lambda folder: quantized(folder, "QDQ"),
    "quantized QOperator": lambda folder: quantized(folder, "QOperator"),
    "optimized by ORT": optimized,
    "exported by torch": by_torch,
}
NAMES = (*TEXTS, *FUNCTIONS, *MADE)


def foreign(name: str, folder: pathlib.Path) -> onnx.ModelProto | pathlib.Path:
    """Return a model of this list, or the file that holds it."""
    if name in TEXTS:
        return parsed(TEXTS[name], ', "my.own" : 1' if "unknown" in name else "")
    return parsed(FUNCTIONS[name], ', "my" : 1') if name in FUNCTIONS else MADE[name](folder)


def proto_of(model: onnx.ModelProto | pathlib.Path) -> onnx.ModelProto:
    return model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
