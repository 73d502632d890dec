"""Change the sizes of many values of a graph at once.

A size cannot be changed at one place alone: the graph is consistent before and after, not between. So the changes are
collected, and then the values of all nodes are brought up to date together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxopt.args import put_arg, shape_text, source_line, value
from fxopt.attributes import get_path, named_tensors, owner_of
from fxopt.errors import PassError, describe
from fxopt.functionalize import fake_call

if TYPE_CHECKING:
    from fxopt.rewriter import Rewriter

__all__ = ["Resizing"]


class Resizing:
    """Changes of one graph, made on behalf of the pass of a :class:`fxopt.Rewriter`, that take effect together.

    Args:
        rw: What records them; its graph is changed, graphs inside it are left alone.
        why: Reason, for the report.
        values: Bring values up to date, which takes longer than all else. Without it, the graph can be run and no more.

    Leaving the ``with`` block brings the values of all nodes up to date.

    Raises:
        PassError: then, if a call cannot run with its new sizes, or the model returns something of another type.
    """

    def __init__(self, rw: Rewriter, why: str, *, values: bool = True) -> None:
        self._rw, self._why, self._values = rw, why, values
        self._module: torch.fx.GraphModule = rw.gm
        self._new: dict[int, torch.Tensor] = {}  # by the id of the tensor that it stands for
        self._old: list[torch.Tensor] = []  # kept alive, so that ids stay theirs
        self._changed: dict[torch.fx.Node, None] = {}
        self._outputs = [n.meta.get("val") for n in self._module.graph.output_node().all_input_nodes]

    def __enter__(self) -> Resizing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is None:
            self._rebind()
            if self._values:
                self._bring_up_to_date()

    def tensor(self, node: torch.fx.Node) -> torch.Tensor:
        """Return the tensor that a ``get_attr`` node reads, as it is by now."""
        found = self._rw.tensor(node)
        return self._new.get(id(found), found)

    def is_done(self, node: torch.fx.Node) -> bool:
        """Return whether the tensor that a ``get_attr`` node reads has been replaced."""
        return id(self._rw.tensor(node)) in self._new

    def readers(self, node: torch.fx.Node) -> int:
        """Return how many uses the tensor of a ``get_attr`` node has."""
        return sum(len(other.users) for other in self._rw.reads(self._rw.tensor(node)))

    def set_tensor(self, node: torch.fx.Node, tensor: torch.Tensor) -> None:
        """Let the attribute that a node reads, under all of its names, be another tensor; a parameter stays one."""
        old = self._rw.tensor(node)
        if tensor.shape == self.tensor(node).shape and torch.equal(tensor, self.tensor(node).detach()):
            return
        trains = isinstance(old, torch.nn.Parameter)
        self._old.append(old)
        self._new[id(old)] = torch.nn.Parameter(tensor, old.requires_grad) if trains else tensor
        self._changed[node] = None

    def set_arg(self, node: torch.fx.Node, name: str, new: Any) -> None:
        """Give a call another argument, by its schema name; what only the old one read goes."""
        inputs = list(node.all_input_nodes)
        put_arg(node, name, new)
        self._changed[node] = None
        self._rw._erase_dead(inputs)

    def set_call(self, node: torch.fx.Node, target: Any, args: Sequence[Any]) -> None:
        """Make a node another call; what only the old one read goes."""
        inputs = list(node.all_input_nodes)
        node.target, node.args, node.kwargs = target, tuple(args), {}
        self._changed[node] = None
        self._rw._erase_dead(inputs)

    def constant(
        self, name: str, tensor: torch.Tensor, *, near: torch.fx.Node, trainable: bool = False
    ) -> torch.fx.Node:
        """Add a tensor; see :meth:`fxopt.Rewriter.constant`."""
        return self._rw.constant(name, tensor, near=near, trainable=trainable, why=self._why)

    def insert_call(self, target: Any, args: Sequence[Any], *, before: torch.fx.Node) -> torch.fx.Node:
        """Insert a call whose value is found later."""
        with before.graph.inserting_before(before):
            new = before.graph.call_function(target, tuple(args))
        self._rw._annotate(new, [before])
        self._changed[new] = None
        return new

    def insert_behind(self, node: torch.fx.Node, target: Any, operand: Any) -> torch.fx.Node:
        """Let all readers of ``node`` read a call of ``target`` on it and an operand."""
        with node.graph.inserting_after(node):
            new = node.graph.call_function(target, (node, operand))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._rw._annotate(new, [node])
        self._changed[new] = None
        return new

    def _rebind(self) -> None:
        for name, tensor in list(named_tensors(self._module)):
            if id(tensor) in self._new:
                *parents, leaf = name.split(".")
                owner: torch.nn.Module = get_path(self._module, ".".join(parents)) if parents else self._module
                table: Any = owner._parameters if leaf in owner._parameters else owner._buffers
                table[leaf] = self._new[id(tensor)]

    def _bring_up_to_date(self) -> None:
        """Compute the values of what was changed, and of what reads a value of another type than before."""
        stale: set[torch.fx.Node] = set()
        new = {id(tensor) for tensor in self._new.values()}
        for node in self._module.graph.nodes:
            before = node.meta.get("val")
            if node.op == "get_attr" and isinstance(before, torch.Tensor):
                tensor = get_path(owner_of(node), str(node.target))
                if id(tensor) in new:
                    self._rw._reads.add(node)
                if tensor.shape != before.shape:
                    node.meta["val"] = self._rw._fake(tensor, node)
                    stale.add(node)
            elif node.op == "call_function" and (node in self._changed or not stale.isdisjoint(node.all_input_nodes)):
                node.meta["val"] = self._computed(node)
                if before is None or shape_text(before) != shape_text(node.meta["val"]):
                    stale.add(node)
        self._check_outputs()
        for node in [node for node in self._changed if not node._erased]:
            self._rw._record("tensor" if node.op == "get_attr" else "argument", node, self._why)

    def _computed(self, node: torch.fx.Node) -> Any:
        try:
            return fake_call(node.target, node.args, node.kwargs)
        except Exception as error:
            got = ", ".join(f"{n.name}: {shape_text(value(n))}" for n in node.all_input_nodes)
            raise PassError(
                describe(
                    f"{self._rw.pass_name} changes sizes so that {node.name}, a call of {node.target}, cannot run: "
                    f"{str(error).partition(chr(10))[0]}",
                    got=got,
                    source=source_line(node),
                )
            ) from error

    def _check_outputs(self) -> None:
        nodes = self._module.graph.output_node().all_input_nodes
        for node, before in zip(nodes, self._outputs, strict=True):
            now = node.meta.get("val")
            if isinstance(before, torch.Tensor) and shape_text(before) != shape_text(now):
                raise PassError(
                    describe(
                        f"{self._rw.pass_name} changes the size of what the model returns",
                        got=f"{node.name}: {shape_text(now)}",
                        wanted=shape_text(before),
                        source=source_line(node),
                    )
                )
