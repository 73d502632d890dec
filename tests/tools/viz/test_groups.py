"""Nodes in groups: each in one, no circles at any level, nothing too long, repeated structure noted."""

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.tools.viz.groups import TOP, nest
from fxopt.tools.viz.model import Edge, Graph, Node


def graph_of(reads, paths, ops=None):
    return Graph(
        tuple(
            Node(
                f"n{i}",
                "op" if ops is None else ops[i],
                "input" if ops is not None and ops[i] == "input" else "other",
                path=tuple(paths[i]),
                inputs=tuple(Edge(f"n{j}", "x") for j in reads[i]),
            )
            for i in range(len(reads))
        )
    )


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 14))
    reads = [draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set() for i in range(count)]
    paths = [draw(st.lists(st.sampled_from("ab"), max_size=3)) for _ in range(count)]
    return graph_of(reads, paths)


def levels(graph, nesting):
    """Yield, for each group and the top, the graph of what stands right in it."""
    parents = [group.parent for group in nesting.groups]

    def ancestors(place):
        found = [("node", place)]
        group = nesting.group_of[place]
        while group != TOP:
            found.append(("group", group))
            group = parents[group]
        return [("top", TOP), *reversed(found)]

    places = {node.id: place for place, node in enumerate(graph.nodes)}
    found = {}
    for source, reader in graph.edges():
        a, b = ancestors(places[source]), ancestors(places[reader])
        depth = next(i for i in range(len(a)) if a[i] != b[i])
        found.setdefault(a[depth - 1], networkx.DiGraph()).add_edge(a[depth], b[depth])
    return found


@given(graphs())
def test_no_level_has_a_circle(graph):
    assert all(networkx.is_directed_acyclic_graph(level) for level in levels(graph, nest(graph)).values())


@given(graphs())
def test_a_node_lies_in_groups_of_its_own_path_only(graph):
    nesting = nest(graph)
    for place, node in enumerate(graph.nodes):
        group, labels = nesting.group_of[place], []
        while group != TOP:
            labels.append(nesting.groups[group].label)
            group = nesting.groups[group].parent
        if node.path:  # others may stand with their reader
            remaining = iter(node.path)
            assert all(label in remaining for label in reversed(labels))


@given(graphs())
def test_no_group_is_empty_or_holds_one_thing(graph):
    nesting = nest(graph)
    held = nesting.group_of + [group.parent for group in nesting.groups]
    assert all(held.count(index) >= 2 for index in range(len(nesting.groups)))


def test_a_module_that_is_called_twice_is_two_groups():
    graph = graph_of([(), (0,), (1,), (2,), (3,)], ["a", "a", "b", "a", "a"])
    nesting = nest(graph)
    assert nesting.group_of == [0, 0, TOP, 1, 1]
    assert [group.label for group in nesting.groups] == ["a", "a"]


def test_modules_side_by_side_stay_whole_though_their_nodes_alternate():
    graph = graph_of([(), (), (0,), (1,), (2, 3)], ["a", "b", "a", "b", ""])
    assert nest(graph).group_of == [0, 1, 0, 1, TOP]


def test_a_long_chain_is_cut_into_sections_in_order():
    count = 10_000
    nesting = nest(graph_of([() if i == 0 else (i - 1,) for i in range(count)], [()] * count))
    sizes = [
        nesting.group_of.count(index) + sum(g.parent == index for g in nesting.groups)
        for index in range(len(nesting.groups))
    ]
    assert max(sizes) <= 48
    assert sum(group.parent == TOP for group in nesting.groups) <= 48
    assert nesting.group_of == sorted(nesting.group_of)
    assert nesting.groups[0].label == "part 1 of 48"


@pytest.mark.parametrize(("last", "like"), [("relu", 0), ("neg", TOP)])
def test_groups_of_the_same_structure_are_noted(last, like):
    graph = graph_of([(), (0,), (1,), (2,), (3,)], ["", "a", "a", "b", "b"], ["input", "add", "relu", "add", last])
    assert [group.like for group in nest(graph).groups] == [TOP, like]


def test_what_is_made_of_weights_alone_stands_with_its_reader():
    graph = graph_of([(), (), (0, 1), (2,)], ["", "", "a", "a"], ["input", "dequantize", "conv", "relu"])
    assert nest(graph).group_of == [TOP, 0, 0, 0]
