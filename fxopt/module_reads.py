"""Generated code that looks every submodule up once.

torch.fx writes each read of a tensor from the root, ``getattr(self.layer1, "0").conv.weight``, and each step costs a
call of Python: in the training step of a small net, several percent of the time. Here each submodule on the way has a
variable of its own, filled where it is first needed in a run; the tensors themselves are read anew each time, as
training code replaces them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.fx.graph import _format_target

__all__ = ["reading_modules_once"]

Body = list[str]


def reading_modules_once(graph: torch.fx.Graph) -> Callable[[Callable[[Body], Body] | None], Callable[[Body], Body]]:
    """Return what :meth:`torch.fx.Graph.on_generate_code` takes, for the code of this graph."""
    targets = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    paths = {_format_target("self", target): target for target in targets if "." in target}
    taken = {node.name for node in graph.nodes}

    def transformer(before: Callable[[Body], Body] | None) -> Callable[[Body], Body]:
        return lambda body: list(_rewritten(body if before is None else before(body), paths, taken))

    return transformer


def _rewritten(body: Body, paths: dict[str, str], taken: set[str]) -> Iterator[str]:
    variables: dict[str, str] = {"": "self"}
    for line in body:
        left, equals, right = line.partition(" = ")
        target = paths.get(right) if equals else None
        if target is None:
            yield line
            continue
        owner, _, name = target.rpartition(".")
        parts = owner.split(".")
        for end in range(1, len(parts) + 1):
            path, outer = ".".join(parts[:end]), ".".join(parts[: end - 1])
            if path not in variables:
                variables[path] = _fresh(f"module_{len(variables)}", taken)
                yield f"{variables[path]} = {_format_target(variables[outer], parts[end - 1])}\n"
        yield f"{left} = {_format_target(variables[owner], name)}"


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
