"""What a node of any ONNX model tells of where it comes from: the metadata of fxopt and of torch.onnx, or its name."""

from __future__ import annotations

import ast

import onnx_ir as ir

from fxopt.args import location_in

__all__ = ["WRITTEN_FOR", "scopes_of", "source_of"]

WRITTEN_FOR = "fxopt.layer"
"""Key of the layer, as "conv", that several nodes of other operators stand for."""


def source_of(node: ir.Node) -> str:
    """Return the user's line, ``net.py:12, in forward: return self.fc(x)``; empty if the file does not tell."""
    held = node.metadata_props
    return held.get("fxopt.source") or _line_in(held.get("pkg.torch.onnx.stack_trace", ""))


def scopes_of(node: ir.Node) -> tuple[str, ...]:
    """Return the modules that a node was called in, the outermost first; names as ``/layer1/conv/Conv`` tell, too."""
    held = node.metadata_props
    if "fxopt.node" in held:
        parts = [part for part in held.get("fxopt.module", "").split(".") if part]
        return tuple(".".join(parts[: end + 1]) for end in range(len(parts)))
    if scopes := held.get("pkg.torch.onnx.name_scopes"):
        names = ast.literal_eval(scopes)
        return tuple(str(name) for name in names[:-1] if name)
    name = node.name or ""
    if name.startswith("/"):
        return tuple(part for part in name.split("/")[1:-1] if part)
    return ()


def _line_in(trace: str) -> str:
    location = location_in(trace)
    if location is None:
        return ""
    file, line, function = location
    where = f"{file.replace(chr(92), '/').rpartition('/')[2]}:{line}, in {function}"
    _, _, behind = trace.partition(f'"{file}", line {line}, in {function}')
    text = behind.strip().partition("\n")[0].strip()
    return f"{where}: {text}" if text and not text.startswith("File ") else where
