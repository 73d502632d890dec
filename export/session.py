"""A thin layer over an ONNX Runtime session: tensors in, tensors out, by position or name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch

from fxopt.errors import ExportError, describe

__all__ = ["LEVELS", "Optimization", "Session", "optimized_model"]

Optimization = Literal["none", "basic", "extended", "all"]
LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_EVERYTHING, _ERRORS_ONLY = 1, 3
_BFLOAT16 = 16  # ONNX's number of the type, which numpy lacks


class Session:
    """A model loaded into ORT on the CPU.

    Attributes:
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        *,
        optimization: Optimization = "all",
        threads: int | None = None,
        save_optimized: str | os.PathLike[str] | None = None,
        profile: bool | str | os.PathLike[str] = False,
        disabled: Sequence[str] = (),
        verbose: bool = False,
    ) -> None:
        """Load a model.

        Args:
            model: A file, or a serialized model.
            optimization: How far ORT may rewrite the graph.
            threads: Threads within one operator; ORT's choice if not given.
            save_optimized: Where to write the graph as ORT rewrote it. Weights that lie beside ``model`` are written
                beside it, to ``<save_optimized>.data``.
            profile: Record times; ``end_profiling`` of the session in ``ort`` returns the file, whose name begins with
                this if it is a path.
            disabled: Names of ORT's optimizers to leave out.
            verbose: Let ORT tell on standard error what it does.

        Raises:
            ExportError: ORT does not accept the model.
        """
        import onnxruntime

        if optimization not in LEVELS:
            raise ValueError(f"optimization is {optimization!r}; wanted one of {', '.join(LEVELS)}")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[optimization])
        options.log_severity_level = _EVERYTHING if verbose else _ERRORS_ONLY
        options.enable_profiling = bool(profile)
        if not isinstance(profile, bool):
            options.profile_file_prefix = os.fspath(profile)
        if threads is not None:
            options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            if save_optimized is not None:
                _save_optimized(options, source, Path(save_optimized))
            self.ort = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], disabled_optimizers=set(disabled)
            )
        except Exception as error:  # ORT raises a different class for each of its status codes
            raise ExportError(describe("ONNX Runtime does not accept the model", because=str(error))) from error
        self.input_names = tuple(str(held.name) for held in self.ort.get_inputs())
        self.output_names = tuple(str(held.name) for held in self.ort.get_outputs())

    def run(self, inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the outputs for inputs by position or by name.

        Raises:
            ExportError: the number of inputs is wrong, or ORT fails.
        """
        values = self.values(inputs)
        try:
            results = self.ort.run_with_ort_values(list(self.output_names), values)
        except Exception as error:
            raise ExportError(describe("ONNX Runtime fails to run the model", because=str(error))) from error
        return tuple(_from_ort(result) for result in results)

    def values(self, inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return inputs by name as ``ort`` takes them.

        Raises:
            ExportError: the number of inputs is wrong.
        """
        if not isinstance(inputs, Mapping):
            if len(inputs) != len(self.input_names):
                raise ExportError(
                    f"the model takes {len(self.input_names)} inputs and got {len(inputs)}: "
                    f"{', '.join(self.input_names)}"
                )
            inputs = dict(zip(self.input_names, inputs, strict=True))
        return {name: _to_ort(tensor) for name, tensor in inputs.items()}


def optimized_model(model: bytes | str | os.PathLike[str], *, optimization: Optimization = "all") -> ir.Model:
    """Return the graph as ORT runs it after its own optimizer, external weights loaded.

    Raises:
        ExportError: ORT does not accept the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        Session(model, optimization=optimization, save_optimized=path)
        return ir.external_data.load_to_model(ir.load(path))


def _save_optimized(options: Any, source: bytes | str, path: Path) -> None:
    """Let ORT write the optimized model; its own way is to refer to weights where they were, from where it is not."""
    options.optimized_model_filepath = os.fspath(path)
    if isinstance(source, bytes):
        return
    constants = (value.const_value for graph in ir.load(source).graphs() for value in graph.initializers.values())
    if any(isinstance(constant, ir.ExternalTensor) for constant in constants):
        entry = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{entry}file_name", f"{path.name}.data")
        options.add_session_config_entry(f"{entry}min_size_in_bytes", "1024")


def _to_ort(tensor: torch.Tensor) -> Any:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> torch.Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return torch.utils.dlpack.from_dlpack(value._ortvalue)  # numpy has no such type
    array = value.numpy()
    return torch.from_numpy(array if array.flags.writeable else array.copy())
