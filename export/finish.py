"""Last touches on the emitted graph: nothing dead is left, and constants lie in the order in which they are read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["bodies_of", "finish"]


def finish(graph: ir.Graph) -> None:
    """Remove what nothing reads, store transposed weights, and drop unused initializers of ``graph``."""
    remove_dead_nodes(graph)
    while sum(  # not any(): each is to be tried
        store_transposed(value) for value in list(graph.initializers.values())
    ):
        pass
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    restore_names(graph)


def restore_names(graph: ir.Graph) -> None:
    """Give a rearranged weight the name of the parameter that it took the place of."""
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for body in (graph, *graph.subgraphs()):
        taken.update(value.name for value in body.inputs)
        taken.update(value.name for node in body for value in node.outputs)
    for value in list(graph.initializers.values()):
        wanted = value.meta.get("wanted")
        if wanted and value.name != wanted and f"{wanted}_" in str(value.name) and wanted not in taken:
            taken.add(wanted)
            value.name = wanted
            if value.const_value is not None:
                value.const_value.name = wanted


def remove_dead_nodes(graph: ir.Graph) -> None:
    """Remove every node whose results nothing reads."""
    for node in reversed(list(graph)):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            for attribute in node.attributes.values():
                for body in bodies_of(attribute):
                    remove_dead_nodes(body)
            continue
        for attribute in node.attributes.values():
            for body in bodies_of(attribute):
                _detach(body)
        graph.remove(node, safe=True)


def store_transposed(value: ir.Value) -> bool:
    """Store a constant in another order of axes if it is only ever read transposed; return whether that was so.

    ``Transpose(weight)`` becomes ``weight``, stored as the matrix product wants it. A weight that is also read as it is
    (an embedding tied to the last layer) stays stored once.
    """
    import torch

    readers = [use.node for use in value.uses()]
    orders = {tuple(node.attributes["perm"].as_ints()) for node in readers if node.op_type == "Transpose"}
    tensor = value.meta.get("tensor")
    if tensor is None or len(orders) != 1 or any(node.op_type != "Transpose" for node in readers):
        return False
    if value.is_graph_output() or any(node.outputs[0].is_graph_output() for node in readers):
        return False
    (order,) = orders
    stored = tensor.permute(order).contiguous()
    held = ir.tensor_adapters.TorchTensor(stored, name=value.name)
    held.metadata_props["fxopt.stored"] = f"permuted by {list(order)}"
    value.const_value, value.shape = held, ir.Shape(tuple(stored.shape))
    value.meta.update(tensor=stored, dims=tuple(stored.shape))
    assert isinstance(stored, torch.Tensor)
    for node in readers:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    return True


def bodies_of(attribute: ir.Attr) -> Sequence[ir.Graph]:
    """Return the graphs that an attribute holds: the sides of a branch, the body of a loop."""
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []


def _detach(body: ir.Graph) -> None:
    """Stop the nodes of a dead body from counting as readers of values around it."""
    for node in reversed(list(body)):
        for attribute in node.attributes.values():
            for inner in bodies_of(attribute):
                _detach(inner)
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
