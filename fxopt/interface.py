"""Inputs and outputs of a captured graph: how they are described, and how arguments and results come and go.

An argument is what the caller passes, a tensor or a tree of them; each leaf is one placeholder and one
:class:`fxopt.InputSpec`. A graph that is called with keywords gets its new arguments as keywords, any other one behind
its positional arguments; both can be given by name. Passes change all this through the Rewriter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxopt.args import dtype, size_text
from fxopt.dimensions import Sample
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule, InputSpec

__all__ = [
    "Interface",
    "add_argument",
    "argument_leaves",
    "argument_names",
    "input_spec",
    "output_names",
    "output_tree",
    "remove_argument",
    "set_outputs",
    "unused_name",
]

Interface = Literal["kept", "extended", "reduced", "retyped"]  # what a pass may do to inputs and outputs


def unused_name(name: str, taken: Any) -> str:
    """Return the name, with underscores behind it while it is taken."""
    while name in taken:
        name += "_"
    return name


def input_spec(node: torch.fx.Node, leaf: Any, names: dict[str, str]) -> InputSpec:
    """Return the description of a placeholder.

    Args:
        node: The placeholder.
        leaf: The example for it.
        names: The user's name of each symbolic size.
    """
    found = node.meta.get("val")
    if not isinstance(found, torch.Tensor):
        return InputSpec(node.name, None, (), leaf)
    texts = [size_text(size, names) for size in found.shape]  # a symbol that the trace found to be a number is one
    return InputSpec(node.name, dtype(node), tuple(int(text) if text.isdigit() else text for text in texts))


def output_names(gm: torch.fx.GraphModule, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Return a name for each output that is not None: the path of keys to it, or ``output`` if there is just one.

    Args:
        gm: The graph.
        given: Names of the first ones.
    """
    flat: Any = gm.graph.output_node().args[0]
    paths = {index: pytree.keystr(path) for path, index in pytree.tree_flatten_with_path(_numbered(gm, len(flat)))[0]}
    kept = [index for index, item in enumerate(flat) if item is not None]
    names = list(given)
    taken: list[str] = [*names, *(node.name for node in gm.graph.nodes if node.op == "placeholder")]
    for index in kept[len(names) :]:
        words = "_".join(re.findall(r"\w+", paths[index]))
        if not words or words[0].isdigit():
            words = "output" if len(kept) == 1 else f"output_{words or index}"
        names.append(unused_name(words, taken))
        taken.append(names[-1])
    return tuple(names)


def output_tree(gm: torch.fx.GraphModule) -> Any:
    """Return what the graph returns, in the structure that the caller gets: nodes, numbers and None."""
    flat: Any = gm.graph.output_node().args[0]
    return pytree.tree_unflatten(list(flat), _info(gm).out_spec)  # type: ignore[arg-type]  # set for every captured graph


def argument_names(gm: CapturedModule) -> list[str]:
    """Return the names of the arguments in order."""
    return list(_info(gm).orig_args)


def argument_leaves(gm: CapturedModule) -> dict[str, list[int]]:
    """Return for each argument which of ``gm.inputs`` are its leaves."""
    args, kwargs = pytree.tree_unflatten(list(range(len(gm.inputs))), _info(gm).in_spec)
    values = [*args, *kwargs.values()]
    return {name: pytree.tree_leaves(value) for name, value in zip(argument_names(gm), values, strict=True)}


def add_argument(gm: CapturedModule, name: str, fakes: Any, examples: Sequence[Any]) -> Any:
    """Add an argument behind the others; see :meth:`fxopt.Rewriter.add_argument`."""
    if len(examples) != len(gm.samples):
        raise PassError(
            describe(
                f"argument {name!r} needs an example for each sample of the graph",
                got=f"{len(examples)} examples",
                wanted=f"{len(gm.samples)}",
            )
        )
    names = argument_names(gm)
    name = unused_name(name, {*names, *(node.name for node in gm.graph.nodes)})
    behind = [node for node in gm.graph.nodes if node.op == "placeholder"]
    flat, structure = pytree.tree_flatten_with_path(fakes)
    made: list[torch.fx.Node] = []
    for path, fake in flat:
        leaf = "_".join([name, *re.findall(r"\w+", pytree.keystr(path))])
        with gm.graph.inserting_after((behind + made)[-1]) if behind + made else gm.graph.inserting_before():
            made.append(gm.graph.placeholder(leaf))
        made[-1].meta["val"] = fake
    placeholders = pytree.tree_unflatten(made, structure)
    before = pytree.tree_unflatten(list(range(len(gm.inputs))), _info(gm).in_spec)
    count = len(gm.inputs)
    gm.inputs += tuple(
        input_spec(node, leaf, gm.symbol_names)
        for node, leaf in zip(made, _leaves_like(examples, structure, name, gm), strict=True)
    )
    numbers = pytree.tree_unflatten(list(range(count, len(gm.inputs))), structure)
    after = _with(before, name, numbers)
    _set_info(gm, orig_args=[*names, name], in_spec=pytree.tree_structure(after))
    gm.samples = tuple(
        Sample(*_with((sample.args, dict(sample.kwargs)), name, example))
        for sample, example in zip(gm.samples, examples, strict=True)
    )
    return placeholders


def remove_argument(gm: CapturedModule, name: str) -> list[torch.fx.Node]:
    """Take the argument ``name`` away, and return its placeholders, which are erased."""
    names = argument_names(gm)
    if name not in names:
        raise PassError(describe(f"the graph has no argument {name!r}", wanted=", ".join(names)))
    gone = argument_leaves(gm)[name]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    read = [placeholders[index] for index in gone if placeholders[index].users]
    if read:
        readers = ", ".join(user.name for user in read[0].users)
        raise PassError(f"argument {name!r} cannot be removed: {read[0].name} is read by {readers}")
    tree = pytree.tree_unflatten(list(range(len(gm.inputs))), _info(gm).in_spec)
    place = names.index(name)
    _set_info(
        gm, orig_args=[other for other in names if other != name], in_spec=pytree.tree_structure(_less(tree, place))
    )
    gm.inputs = tuple(spec for index, spec in enumerate(gm.inputs) if index not in gone)
    gm.samples = tuple(Sample(*_less((sample.args, dict(sample.kwargs)), place)) for sample in gm.samples)
    for index in gone:
        gm.graph.erase_node(placeholders[index])
    return [placeholders[index] for index in gone]


def set_outputs(gm: CapturedModule, tree: Any, names: Sequence[str]) -> None:
    """Let the graph return ``tree``; see :meth:`fxopt.Rewriter.set_outputs`."""
    flat, structure = pytree.tree_flatten(tree)
    gm.graph.output_node().args = (tuple(flat),)
    _set_info(gm, out_spec=structure)
    gm.output_names = output_names(gm, names)


def _leaves_like(examples: Sequence[Any], structure: Any, name: str, gm: CapturedModule) -> list[Any]:
    """Return the leaves of the first example, after a check that all have the structure of the argument."""
    for example in examples:
        found = pytree.tree_structure(example)
        if found != structure:
            raise PassError(
                describe(f"an example for argument {name!r} has another structure", got=found, wanted=structure)
            )
    return pytree.tree_leaves(examples[0]) if examples else [None] * structure.num_leaves


def _with(arguments: Any, name: str, value: Any) -> Any:
    args, kwargs = arguments
    return (tuple(args), {**kwargs, name: value}) if kwargs else ((*args, value), {})


def _less(arguments: Any, place: int) -> Any:
    args, kwargs = arguments
    if place < len(args):
        return tuple(item for index, item in enumerate(args) if index != place), kwargs
    return tuple(args), {key: item for index, (key, item) in enumerate(kwargs.items()) if index != place - len(args)}


def _numbered(gm: torch.fx.GraphModule, count: int) -> Any:
    return pytree.tree_unflatten(list(range(count)), _info(gm).out_spec)  # type: ignore[arg-type]  # set for every captured graph


def _info(gm: torch.fx.GraphModule) -> _PyTreeInfo:
    return gm.graph._codegen.pytree_info  # type: ignore[attr-defined,no-any-return]  # torch declares the base class only


def _set_info(gm: torch.fx.GraphModule, **changed: Any) -> None:
    """Change how the graph is called; a copy of it may share the old description, which is left alone."""
    gm.graph.set_codegen(_PyTreeCodeGen(_info(gm)._replace(**changed)))
