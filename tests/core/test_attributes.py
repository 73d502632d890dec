"""Names for new attributes."""

from __future__ import annotations

import pytest
import torch

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
