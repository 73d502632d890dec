"""The one way in which a pass changes a graph.

Every change goes through a method of :class:`Rewriter`, which records it with its reason, gives new nodes their value,
source line and provenance, and drops what became dead. A pass therefore cannot report something else than it did.

Each node that ``calls()`` or ``nodes()`` hands out is one *site*: the changes made until the next node is asked for
belong to it (or to the ``part()`` entered), and the pass manager can run the pass again with some sites left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from fxopt.args import check_same_type, put_arg, shape_text, source_line, value
from fxopt.attributes import (
    Removable,
    attach,
    fresh_name,
    named_tensors,
    owner_of,
    remove_unread,
)
from fxopt.changes import Change, Skip
from fxopt.effects import has_effect, is_random
from fxopt.errors import PassError, describe
from fxopt.functionalize import fake_call, same_value_type
from fxopt.graph_module import CapturedModule, Provenance, graph_modules
from fxopt.graph_reader import GraphReader
from fxopt.interface import add_argument, remove_argument, set_outputs

__all__ = ["Change", "Rewriter", "Skip"]


class Rewriter(GraphReader):
    """Reads and changes one graph on behalf of one pass.

    Attributes:
        gm: The graph under change; to be read, not written.
        changes: What was done, in order.
        skips: What was refused, with reasons.
        notes: What else the report should say, such as what was tried and measured.
    """

    def __init__(self, gm: CapturedModule, pass_name: str, *, only: Collection[str] | None = None) -> None:
        """Args: gm: changed in place. pass_name: for the record. only: names of the sites to hand out; all if None."""
        super().__init__(gm, only)
        self.pass_name = pass_name
        self.changes: list[Change] = []
        self.skips: list[Skip] = []
        self.notes: list[str] = []
        self._attributes = {name for name, _ in named_tensors(gm)}
        self._removable = Removable(gm)
        self._fake_mode: Any = None
        self._touched: set[torch.fx.GraphModule] = set()

    # ---- changing

    def replace_value(self, node: torch.fx.Node, new: torch.fx.Node, *, why: str) -> None:
        """Let every reader of ``node`` read ``new`` instead, and erase what nobody reads any more.

        Raises:
            PassError: element type, rank or a fixed size differ.
        """
        check_same_type(self.pass_name, node, new)
        self._record("replaced", node, why)
        node.replace_all_uses_with(new)
        self._erase_dead([node], named=node)

    def replace_call(
        self,
        node: torch.fx.Node,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        why: str,
        sources: Sequence[torch.fx.Node] = (),
    ) -> torch.fx.Node:
        """Compute the value of ``node`` by another call, which takes over its name, and return that call.

        Args:
            node: The node to replace.
            target: The operator of the new call.
            args: Its arguments: nodes, numbers and lists of these.
            kwargs: Its keyword arguments.
            why: Reason, for the report.
            sources: Other nodes that went into the new one, for its provenance.

        Raises:
            PassError: element type, rank or a fixed size of the result differ.
        """
        new = self._call(node, target, args, kwargs, [node, *sources])
        check_same_type(self.pass_name, node, new)
        self._record("replaced", node, why)
        node.replace_all_uses_with(new)
        name = node.name
        self._erase_dead([node], named=node)
        if node._erased:
            new.name = name
        return new

    def insert_call(
        self,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        before: torch.fx.Node,
        why: str,
        sources: Sequence[torch.fx.Node] = (),
    ) -> torch.fx.Node:
        """Insert a call before ``before`` and return it; ``sources`` default to ``before``."""
        new = self._call(before, target, args, kwargs, list(sources) or [before])
        self._record("inserted", new, why)
        return new

    def copy_call(
        self,
        inner: torch.fx.Node,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        before: torch.fx.Node,
        why: str,
        name: str | None = None,
    ) -> torch.fx.Node:
        """Insert the call that ``inner`` makes in another graph, with other arguments; it keeps its modes and line.

        It is called ``name``, if that is given, with a number behind it if the graph has such a node.
        """
        new = self._call(before, inner.target, args, kwargs, [inner], name)
        new.meta |= {key: inner.meta[key] for key in ("modes", "branch") if key in inner.meta}
        self._record("inserted", new, why)
        return new

    def graph(self, name: str, module: torch.fx.GraphModule, *, near: torch.fx.Node, why: str) -> torch.fx.Node:
        """Add a graph, for a branch or loop to run, and return the node that reads it; see :meth:`constant`."""
        path = fresh_name(self.gm, name, self._attributes)
        owner_of(near).add_module(path, module)
        self._attributes.add(path)
        self._removable.add(path)
        with near.graph.inserting_before(near):
            node = near.graph.get_attr(path)
        self._annotate(node, [near])
        self._record("constant", node, why)
        return node

    def set_arg(self, node: torch.fx.Node, name: str, new: Any, *, why: str) -> None:
        """Set the argument ``name`` (by operator schema) of a call, and bring its value up to date."""
        old = list(node.all_input_nodes)
        put_arg(node, name, new)
        node.meta["val"] = fake_call(node.target, node.args, node.kwargs)
        self._record("argument", node, why)
        self._erase_dead(old)

    def replace_argument(self, node: torch.fx.Node, old: torch.fx.Node, new: Any, *, why: str) -> None:
        """Let ``node`` alone take ``new``, a node or a number, where it took ``old``, and update its value."""
        swap = torch.fx.map_arg((node.args, node.kwargs), lambda source: new if source is old else source)
        node.args, node.kwargs = swap
        if node.op == "call_function" and not same_value_type(old, new):
            node.meta["val"] = fake_call(node.target, node.args, node.kwargs)
        self._record("argument", node, why)
        self._erase_dead([old])

    def erase(self, node: torch.fx.Node, *, why: str) -> None:
        """Erase a node that nobody reads, and what only it read.

        Raises:
            PassError: the node is read, or has an effect.
        """
        if node.users or has_effect(node):
            readers = ", ".join(user.name for user in node.users)
            reason = f"it is read by {readers}" if node.users else "it has an effect"
            raise PassError(f"{self.pass_name} cannot erase {node.name}: {reason}")
        self._record("erased", node, why)
        self._erase_dead([node], named=node)

    def fix_mode(self, node: torch.fx.Node, *, why: str) -> None:
        """Make the arguments of the current mode the only ones."""
        if node.meta.pop("modes", None) is not None:
            self._record("argument", node, why)

    def discard(self, node: torch.fx.Node, *, why: str) -> None:
        """Erase a node that nobody reads although it has an effect, and what only it read.

        Raises:
            PassError: the node is read.
        """
        if node.users:
            readers = ", ".join(user.name for user in node.users)
            raise PassError(f"{self.pass_name} cannot discard {node.name}: it is read by {readers}")
        self._record("erased", node, why)
        inputs = list(node.all_input_nodes)
        node.graph.erase_node(node)
        self._erase_dead(inputs)

    def constant(
        self, name: str, tensor: torch.Tensor, *, near: torch.fx.Node, trainable: bool = False, why: str = ""
    ) -> torch.fx.Node:
        """Add a tensor to the graph and return the node that reads it.

        Args:
            name: Wanted dotted name; made unique, and fit to be an attribute.
            tensor: The tensor; becomes a parameter if ``trainable``, else a buffer.
            near: Node before which the read is placed.
            trainable: Make it a parameter.
            why: Reason, for the report; says what was added if not given.
        """
        held = torch.nn.Parameter(tensor.detach()) if trainable else tensor.detach()
        return self.share(name, held, near=near, why=why)

    def share(
        self, name: str, tensor: torch.Tensor, *, near: torch.fx.Node, persistent: bool = True, why: str = ""
    ) -> torch.fx.Node:
        """Add a tensor itself, which others may hold too, and return the node that reads it; see :meth:`constant`.

        Args:
            name: Wanted dotted name.
            tensor: The tensor; a parameter stays one, anything else becomes a buffer.
            near: Node before which the read is placed.
            persistent: Whether a buffer is part of the state dict.
            why: Reason, for the report; says what was added if not given.
        """
        path = fresh_name(self.gm, name, self._attributes)
        attach(owner_of(near), path, tensor, persistent=persistent)
        self._attributes.add(path)
        self._removable.add(path)
        with near.graph.inserting_before(near):
            node = near.graph.get_attr(path)
        node.meta["val"] = self._fake(tensor, near)
        self._reads.add(node)
        self._annotate(node, [near])
        self._record("constant", node, why or f"added {shape_text(tensor)}")
        return node

    def set_tensor(self, node: torch.fx.Node, tensor: torch.Tensor, *, why: str) -> None:
        """Bind the attribute that ``node`` reads to another tensor; it stays a parameter if it is one.

        The old tensor is not written: the graph before the pass still holds it.
        """
        root = owner = owner_of(node)
        *parents, leaf = str(node.target).split(".")
        for part in parents:
            owner = owner._modules[part]  # type: ignore[assignment]  # no part of a path is None
        old = self.tensor(node)
        readers = [reader for reader in self._reads.of_tensor(root, old) if reader.target == node.target]
        if leaf in owner._parameters:
            owner._parameters[leaf] = torch.nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
        else:
            owner._buffers[leaf] = tensor.detach()
        for reader in readers:
            reader.meta["val"] = self._fake(tensor, node)
            self._reads.add(reader)
        self._record("tensor", node, why)

    def add_argument(self, name: str, fakes: Any, examples: Sequence[Any], *, why: str) -> Any:
        """Let the graph take one more argument, the last one.

        Args:
            name: Its name, with an underscore behind it if an argument or a node is called so.
            fakes: The fake tensor that it is, or a tree of them (dicts, lists, tuples), with the graph's own sizes.
            examples: The example for each of the graph's samples, of the same structure.
            why: Reason, for the report.

        Returns:
            The placeholder, or the tree of them.

        Raises:
            PassError: there is not one example for each sample.
        """
        placeholders = add_argument(self.gm, name, fakes, examples)
        for node in pytree.tree_leaves(placeholders):
            node.meta["fxopt"] = Provenance(self.pass_name)
            self._record("inserted", node, why)
        return placeholders

    def remove_argument(self, name: str, *, why: str) -> None:
        """Let the graph take the argument ``name`` no longer, which nothing reads.

        Raises:
            PassError: something reads it, or there is no such argument.
        """
        for node in remove_argument(self.gm, name):
            self._record("erased", node, why)

    def set_outputs(self, tree: Any, names: Sequence[str], *, why: str) -> None:
        """Let the graph return a tree of nodes, numbers and None, and erase what nobody reads any more.

        Args:
            tree: What to return.
            names: For the first leaves that are not None; the others are named by where they stand in the tree.
            why: Reason, for the report.
        """
        output = self.gm.graph.output_node()
        old = list(output.all_input_nodes)
        set_outputs(self.gm, tree, names)
        self._record("argument", output, why)
        self._erase_dead(old)

    def leave(self, name: str, record: Any) -> None:
        """Leave plain JSON values for later passes in ``gm.records``, or take away what is there, by None."""
        self.gm.records.pop(name, None)
        if record is not None:
            self.gm.records[name] = record

    def skip(self, node: torch.fx.Node, reason: str) -> None:
        """Record that the pass looked at ``node`` and left it alone."""
        self.skips.append(Skip(node.name, reason, source_line(node), self.pass_name))

    def adopt(self, other: torch.fx.GraphModule, *, why: str) -> None:
        """Take over the graph and tensors that somebody else's pass returned."""
        from fxopt.foreign import adopt

        for kind, node, source in adopt(self.gm, other):
            self.changes.append(Change(kind, node, why, "", source, self.pass_name))
        self._touched.add(self.gm)

    def drop_unread_attributes(self, *, why: str) -> None:
        """Remove every parameter and buffer that no graph reads, those that were never read included."""
        for name in remove_unread(self.gm, self._attributes):
            self.changes.append(Change("erased", name, why, "", None, self.pass_name))

    def finish(self) -> None:
        """Bring code and attributes in line with the graph. The pass manager calls this once, after the pass."""
        if not self.changes:
            return
        self.leave("passes", [*self.gm.records.get("passes", ()), *dict.fromkeys(c.pass_name for c in self.changes)])
        self._removable.remove_unread()
        for module in graph_modules(self.gm):
            if module in self._touched or module is self.gm:
                module.recompile()

    # ---- inside

    def _call(
        self,
        at: torch.fx.Node,
        target: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        sources: Sequence[torch.fx.Node],
        name: str | None = None,
    ) -> torch.fx.Node:
        with at.graph.inserting_before(at):
            new = at.graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name)
        try:
            new.meta["val"] = fake_call(target, new.args, new.kwargs)
        except Exception as error:
            got = ", ".join(f"{n.name}: {shape_text(value(n))}" for n in new.all_input_nodes)
            at.graph.erase_node(new)
            raise PassError(
                describe(
                    f"{self.pass_name} builds a call of {target} that cannot run: {error}",
                    got=got,
                    source=source_line(at),
                )
            ) from error
        self._annotate(new, sources)
        return new

    def _annotate(self, node: torch.fx.Node, sources: Sequence[torch.fx.Node]) -> None:
        shown = ("stack_trace", "nn_module_stack")
        node.meta |= {key: sources[0].meta[key] for key in shown if key in sources[0].meta}
        origins: dict[str, None] = {}
        for source in sources:
            made = source.meta.get("fxopt")
            origins.update(dict.fromkeys(made.sources if made else (source.name,)))
        node.meta["fxopt"] = Provenance(self.pass_name, tuple(origins))

    def _record(self, kind: str, node: torch.fx.Node, why: str) -> None:
        owner = node.graph.owning_module
        if owner is not None:
            self._touched.add(owner)
        self.changes.append(Change(kind, node.name, why, self._site, source_line(node), self.pass_name))

    def _erase_dead(self, candidates: list[torch.fx.Node], named: torch.fx.Node | None = None) -> None:
        """Erase what nobody reads. A random call goes only if the pass named it: without it, others draw anew."""
        stack = list(candidates)
        while stack:
            node = stack.pop()
            if node._erased or node.users or has_effect(node) or (node is not named and is_random(node)):
                continue
            inputs = list(node.all_input_nodes)
            node.graph.erase_node(node)
            stack.extend(inputs)

    def _fake(self, tensor: torch.Tensor, near: torch.fx.Node) -> Any:
        if self._fake_mode is None:
            self._fake_mode = detect_fake_mode([n.meta["val"] for n in near.graph.nodes if "val" in n.meta])
        if self._fake_mode is None:
            return tensor
        return self._fake_mode.from_tensor(tensor.detach(), static_shapes=True)
