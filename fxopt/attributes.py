"""Attributes of a graph module under dotted paths: read, look for, register and remove them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from fxopt.errors import InvariantError

__all__ = [
    "Reads",
    "Removable",
    "attach",
    "fresh_name",
    "get_path",
    "hasattr_path",
    "made_of_attributes",
    "named_tensors",
    "owner_of",
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
        if not hasattr_path(gm, name):
            continue  # it went with the graph that held it
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


def fresh_name(root: torch.nn.Module, name: str, taken: Collection[str]) -> str:
    """Return ``name`` fit to be a dotted path, with a number behind it if ``root`` or ``taken`` has it already."""
    parts = ["".join(c if c.isalnum() else "_" for c in part) or "constant" for part in name.split(".")]
    plain = ".".join(parts)

    def is_taken(path: str) -> bool:
        return path in taken or hasattr_path(root, path)

    if not is_taken(plain):
        return plain
    # Numbers are taken in order, so the end of them is looked for in steps that double, and then halve.
    used, free = 0, 1
    while is_taken(f"{plain}_{free}"):
        used, free = free, 2 * free
    while free - used > 1:
        middle = (used + free) // 2
        used, free = (middle, free) if is_taken(f"{plain}_{middle}") else (used, middle)
    return f"{plain}_{free}"


class Reads:
    """Which ``get_attr`` nodes read which tensor, found in one walk and kept up to date."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        """Args: gm: with the graphs inside it. Walked when it is first asked for a tensor."""
        self._gm = gm
        self._found: dict[int, list[torch.fx.Node]] | None = None

    def add(self, node: torch.fx.Node) -> None:
        """Note that ``node`` reads what is now under its path."""
        if self._found is not None:
            self._found.setdefault(id(get_path(owner_of(node), str(node.target))), []).append(node)

    def everywhere(self, tensor: torch.Tensor) -> list[torch.fx.Node]:
        """Return the nodes that read ``tensor`` in any graph, by whichever of its names."""
        if self._found is None:
            self._found = {}
            for module in self._gm.modules():
                for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                    if node.op == "get_attr":
                        self.add(node)
        return [
            node
            for node in self._found.get(id(tensor), [])
            if not node._erased and get_path(owner_of(node), str(node.target)) is tensor
        ]

    def of_tensor(self, owner: torch.nn.Module, tensor: torch.Tensor) -> list[torch.fx.Node]:
        """Return those of them in the graph of ``owner``."""
        return [node for node in self.everywhere(tensor) if owner_of(node) is owner]


def made_of_attributes(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the nodes that depend on parameters and buffers alone."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and found.issuperset(sources)):
            found.add(node)
    return found


class Removable:
    """What goes from a graph when nothing reads it any more: what was read, by whichever of its names, and what is new.

    What nothing read in the first place is the user's, and stays.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        """Args: gm: with the graphs inside it, before any change."""
        self._gm = gm
        self._names = read_attributes(gm)
        read = {id(tensor) for name, tensor in named_tensors(gm) if name in self._names}
        self._tied = {name for name, tensor in named_tensors(gm) if id(tensor) in read} - self._names

    def add(self, name: str) -> None:
        """Add what is new under a dotted path."""
        self._names.add(name)

    def remove_unread(self) -> None:
        """Remove what no graph reads. Another name of a tied weight stays as long as the weight is read."""
        read = {id(get_path(self._gm, name)) for name in read_attributes(self._gm)}
        tied = {
            name for name in self._tied if hasattr_path(self._gm, name) and id(get_path(self._gm, name)) not in read
        }
        remove_unread(self._gm, self._names | tied)
