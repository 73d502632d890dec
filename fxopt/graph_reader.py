"""What a pass reads of a graph: its nodes, one site after the other, and what they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from fxopt.args import dtype, shape, value
from fxopt.attributes import Reads, get_path, owner_of
from fxopt.graph_module import CapturedModule, graph_modules

__all__ = ["GraphReader"]


class GraphReader:
    """Reads one graph on behalf of one pass, and knows at which site the pass is.

    Attributes:
        gm: The graph; to be read, not written.
    """

    def __init__(self, gm: CapturedModule, only: Collection[str] | None) -> None:
        """Args: gm: with the graphs inside it. only: names of the sites to hand out; all if None."""
        self.gm = gm
        self._only = None if only is None else frozenset(only)
        self._wholes = {site.rpartition("[")[0] for site in only or () if "[" in site}
        self._site = ""
        self._reads = Reads(gm)
        self._paths: dict[torch.nn.Module, str] = {}

    def nodes(self) -> Iterator[torch.fx.Node]:
        """Yield every node but placeholders and outputs, in order, inner graphs included; each is one site.

        The list is taken at the start: nodes made meanwhile are not visited, nodes erased meanwhile neither.
        """
        for module in graph_modules(self.gm):
            yield from self.nodes_of(module)

    def calls(self, *targets: Any) -> Iterator[torch.fx.Node]:
        """Yield the calls of any of ``targets``; each is one site. See :meth:`nodes`."""
        wanted = frozenset(targets)
        for module in graph_modules(self.gm):
            found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in wanted]
            yield from self._sites(found)

    def nodes_of(self, module: torch.fx.GraphModule, *, backwards: bool = False) -> Iterator[torch.fx.Node]:
        """Yield the nodes of one graph alone, the last one first if ``backwards``. See :meth:`nodes`."""
        found = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
        yield from self._sites(found[::-1] if backwards else found)

    def _sites(self, nodes: list[torch.fx.Node]) -> Iterator[torch.fx.Node]:
        for node in nodes:
            if node._erased:
                continue
            site = self.site_name(node)
            if self._only is not None and site not in self._only and site not in self._wholes:
                continue
            outer, self._site = self._site, site
            yield node
            self._site = outer

    @contextlib.contextmanager
    def part(self, name: object) -> Iterator[bool]:
        """Work at a part of the present site, such as one layer of a call that computes many: a site ``lstm[1]``.

        All changes of a site that has parts are made at one of them. A part can be entered more than once.

        Yields:
            Whether the part is to be worked at; a site that was asked for by its name has all of its parts.
        """
        whole, self._site = self._site, f"{self._site}[{name}]"
        try:
            yield self._only is None or whole in self._only or self._site in self._only
        finally:
            self._site = whole

    def site_name(self, node: torch.fx.Node) -> str:
        """Return the name that stands for the node across reruns of the pass."""
        owner = owner_of(node)
        if owner is self.gm:
            return node.name
        if owner not in self._paths:
            self._paths = {module: path for path, module in self.gm.named_modules()}
        return f"{self._paths[owner]}/{node.name}"

    def value(self, node: torch.fx.Node) -> Any:
        """Return what the node yields: a FakeTensor, a SymInt or number, or a tuple of these."""
        return value(node)

    def dtype(self, node: torch.fx.Node) -> torch.dtype:
        """Return the element type of the node's tensor."""
        return dtype(node)

    def shape(self, node: torch.fx.Node) -> torch.Size:
        """Return the shape of the node's tensor; dynamic sizes are SymInts."""
        return shape(node)

    def tensor(self, node: torch.fx.Node) -> torch.Tensor:
        """Return the tensor behind a ``get_attr`` node.

        Raises:
            TypeError: the node reads no attribute, or one that is not a tensor.
        """
        if node.op != "get_attr":
            raise TypeError(f"{node.name} is a {node.op}, not the read of an attribute")
        found = get_path(owner_of(node), str(node.target))
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"{node.name} reads {node.target!r}, which is a {type(found).__name__}")
        return found

    def readers(self, path: str, graph: torch.fx.Graph) -> int:
        """Return how many ``get_attr`` nodes of a graph read the tensor at ``path``, by whichever of its names."""
        owner = graph.owning_module
        return 0 if owner is None else len(self._reads.of_tensor(owner, get_path(owner, path)))

    def reads(self, tensor: torch.Tensor) -> list[torch.fx.Node]:
        """Return the ``get_attr`` nodes of all graphs that read a tensor, by whichever of its names."""
        return self._reads.everywhere(tensor)
