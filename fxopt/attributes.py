"""Attributes of a graph module under dotted paths: read, look for, register and remove them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from fxopt.errors import InvariantError

__all__ = [
    "attach",
    "fresh_name",
    "get_path",
    "hasattr_path",
    "named_tensors",
    "owner_of",
    "path_of",
    "read_attributes",
    "remove_unread",
]


def attach(root: torch.nn.Module, path: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
    """Register ``tensor`` under a dotted path, making plain containers on the way."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root._modules[part]  # type: ignore[assignment]  # no part of a path is None
    if isinstance(tensor, torch.nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent=persistent)


def get_path(root: torch.nn.Module, path: str) -> Any:
    """Return what ``root`` has under a dotted path."""
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def hasattr_path(root: torch.nn.Module, path: str) -> bool:
    """Return whether ``root`` has something under a dotted path."""
    try:
        get_path(root, path)
    except AttributeError:
        return False
    return True


def named_tensors(root: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer, those that several names share under each of them."""
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def read_attributes(gm: torch.fx.GraphModule) -> set[str]:
    """Return the dotted name of every attribute that the graph, or a graph inside it, reads."""
    found: set[str] = set()
    for name, module in gm.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            prefix = f"{name}." if name else ""
            found |= {prefix + str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return found


def remove_unread(gm: torch.fx.GraphModule, names: Collection[str]) -> list[str]:
    """Remove those of the named tensors that no graph reads, and containers that became empty; return their names."""
    read = read_attributes(gm)
    removed = [name for name in names if name not in read and hasattr_path(gm, name)]
    for name in removed:
        *parents, leaf = name.split(".")
        chain: list[torch.nn.Module] = [gm]
        for part in parents:
            chain.append(chain[-1]._modules[part])  # type: ignore[arg-type]  # no part of a path is None
        delattr(chain[-1], leaf)
        for depth in range(len(parents), 0, -1):
            module = chain[depth]
            if isinstance(module, torch.fx.GraphModule) or module._parameters or module._buffers or module._modules:
                break
            del chain[depth - 1]._modules[parents[depth - 1]]
    return removed


def owner_of(node: torch.fx.Node) -> torch.nn.Module:
    """Return the module whose graph holds ``node``.

    Raises:
        InvariantError: there is none.
    """
    owner = node.graph.owning_module
    if owner is None:
        raise InvariantError(f"the graph of {node.name} belongs to no module")
    return owner


def path_of(root: torch.nn.Module, wanted: torch.nn.Module) -> str:
    """Return the dotted path under which ``root`` holds the module ``wanted``."""
    found: str = next(name for name, module in root.named_modules() if module is wanted)
    return found


def fresh_name(root: torch.nn.Module, name: str, taken: Collection[str]) -> str:
    """Return ``name`` fit to be a dotted path, with a number behind it if ``root`` or ``taken`` has it already."""
    parts = ["".join(c if c.isalnum() else "_" for c in part) or "constant" for part in name.split(".")]
    path, count = ".".join(parts), 0
    while path in taken or hasattr_path(root, path):
        count += 1
        path = ".".join(parts) + f"_{count}"
    return path
