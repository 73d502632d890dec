"""Names for new attributes, and what goes when nothing reads it."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.attributes import attach, fresh_name


@pytest.mark.parametrize("others", [0, 1, 2, 7, 8, 9, 100])
def test_fresh_name_is_the_next_number(others: int) -> None:
    root = torch.nn.Module()
    for index in range(others + 1):
        attach(root, "layer.weight" + (f"_{index}" if index else ""), torch.zeros(1))
    assert fresh_name(root, "layer.weight", ()) == f"layer.weight_{others + 1}"


def test_fresh_name_is_free_where_the_numbers_have_gaps() -> None:
    taken = {"w", "w_1", "w_2", "w_4", "w_8", "w_9"}
    assert fresh_name(torch.nn.Module(), "w", taken) not in taken


def test_fresh_name_is_fit_to_be_an_attribute() -> None:
    assert fresh_name(torch.nn.Module(), "a b..c-d", ()) == "a_b.constant.c_d"


def test_fresh_names_of_one_kind_cost_few_look_ups() -> None:
    looked: list[str] = []

    class Taken(frozenset[str]):
        def __contains__(self, name: object) -> bool:
            looked.append(str(name))
            return super().__contains__(name)

    taken = Taken({"w", *(f"w_{index}" for index in range(1, 5000))})
    assert fresh_name(torch.nn.Module(), "w", taken) == "w_5000"
    assert len(looked) < 30


class Tied(torch.nn.Module):
    """A weight of two names, of which the graph reads one, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(index))


@pytest.mark.parametrize("readers", [1, 2])
def test_names_of_a_tied_weight_go_with_its_last_reader(readers: int) -> None:
    gm = fxopt.capture(Tied(), torch.arange(6), modes="current")
    rw = fxopt.Rewriter(gm, "test")
    names = {"table.weight", "head.weight", "unused"}
    assert {name for name, _ in gm.named_parameters(remove_duplicate=False)} == names
    for reader in [node for node in gm.graph.nodes if "weight" in str(node.args)][:readers]:
        weight = fxopt.tensor_arg(reader, "weight")
        new = rw.constant("other", rw.tensor(weight).detach() * 2, near=reader)
        rw.replace_argument(reader, weight, new, why="doubled")
    rw.finish()
    left = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    assert left == (names if readers == 1 else {"unused"})
    assert len(list(gm.named_buffers())) == readers
