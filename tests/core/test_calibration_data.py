"""What counts as calibration data, and what the errors say about data that do not."""

from __future__ import annotations

import re
from collections import UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxopt
from fxopt import CalibrationError, Sample
from fxopt.calibration_data import calibration_length, calibration_samples

X = torch.arange(12.0).reshape(6, 2)
LABELS = torch.arange(6)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Two(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids * mask


class Flagged(nn.Module):
    def forward(self, x: Tensor, flag: bool, y: Tensor) -> Tensor:
        return x + y if flag else x - y


class Nested(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["a"] + batch["b"]


@pytest.fixture(scope="module")
def one() -> fxopt.CapturedModule:
    return fxopt.capture(One(), (X[:2],), dynamic_shapes={"x": {0: "batch"}})


@pytest.fixture(scope="module")
def two() -> fxopt.CapturedModule:
    return fxopt.capture(Two(), (X[:2], X[:2]), dynamic_shapes={"ids": {0: "batch"}, "mask": {0: "batch"}})


def fixed_batch() -> fxopt.CapturedModule:
    return fxopt.capture(One(), (X[:4],))


def leaves(gm: fxopt.CapturedModule, data: Any) -> list[list[Any]]:
    return [gm.flatten_inputs(*sample.args, **sample.kwargs) for sample in calibration_samples(gm, data)]


def same(found: list[list[Any]], *wanted: tuple[Any, ...]) -> bool:
    return len(found) == len(wanted) and all(
        len(a) == len(b)
        and all(torch.equal(p, q) if isinstance(p, Tensor) else p is q for p, q in zip(a, b, strict=True))
        for a, b in zip(found, wanted, strict=True)
    )


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "item",
    [
        X,
        (X,),
        [X],
        (X, LABELS),
        [X, LABELS],
        (X, "a label"),
        (X, {"boxes": LABELS}),
        ((X,), LABELS),
        ({"x": X}, LABELS),
        {"x": X},
        {"x": X, "labels": LABELS, "path": "here"},
        UserDict({"x": X, "labels": LABELS}),
        Pair(X, LABELS),
        Sample((X,)),
        (Sample((X,)), LABELS),
    ],
)
def test_forms_of_an_item_with_one_input(one: fxopt.CapturedModule, item: Any) -> None:
    assert same(leaves(one, [item]), (X,))


@pytest.mark.parametrize(
    "item",
    [
        (X, -X),
        [X, -X],
        (X, -X, LABELS),
        ((X, -X), LABELS),
        ([X, -X], "a label"),
        {"mask": -X, "ids": X},
        ({"mask": -X, "ids": X, "labels": LABELS}, None),
        Sample((X,), {"mask": -X}),
    ],
)
def test_forms_of_an_item_with_two_inputs(two: fxopt.CapturedModule, item: Any) -> None:
    assert same(leaves(two, [item]), (X, -X))


@pytest.mark.parametrize("item", [(X, -X), (X, True, -X), (X, -X, LABELS), ((X, True, -X), LABELS), {"x": X, "y": -X}])
def test_inputs_that_are_no_tensors_are_known(item: Any) -> None:
    gm = fxopt.capture(Flagged(), (X, True, X))
    assert same(leaves(gm, [item]), (X, True, -X))


@pytest.mark.parametrize("item", [{"a": X, "b": -X}, ({"a": X, "b": -X},), ({"a": X, "b": -X}, LABELS), (X, -X)])
def test_one_argument_that_is_a_dict(item: Any) -> None:
    gm = fxopt.capture(Nested(), ({"a": X, "b": X},))
    assert same(leaves(gm, [item]), (X, -X))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


def test_loaders(one: fxopt.CapturedModule) -> None:
    batches = [(X[:4],), (X[4:],)]
    labelled = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    assert same(leaves(one, labelled), *batches)
    assert same(leaves(one, labelled), *batches)
    assert same(leaves(one, DataLoader(Stream(), batch_size=4)), *batches)
    assert same(leaves(one, (part for part in X.split(4))), *batches)
    assert same(leaves(one, lambda: (part for part in X.split(4))), *batches)
    assert [calibration_length(data) for data in (labelled, DataLoader(Stream()), iter([X]), lambda: [X])] == [
        2,
        None,
        None,
        None,
    ]


def test_items_are_read_one_at_a_time(one: fxopt.CapturedModule) -> None:
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield X

    samples = calibration_samples(one, endless)
    for _ in range(3):
        next(samples)
    assert taken == 3


def failure(gm: fxopt.CapturedModule, data: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        list(calibration_samples(gm, data))
    return str(caught.value)


def test_empty_loader(one: fxopt.CapturedModule) -> None:
    for data in ([], DataLoader(TensorDataset(X), batch_size=64, drop_last=True), list):
        assert "the calibration data are empty" in failure(one, data)
    assert "wanted  x: f32[batch, 2]" in failure(one, [])


def test_used_up_iterator(one: fxopt.CapturedModule) -> None:
    generator = (part for part in X.split(2))
    assert len(leaves(one, generator)) == 3
    text = failure(one, generator)
    assert "are a generator that is used up" in text
    assert "pass a list, or a function that returns a new iterator" in text
    iterator = iter([X])
    leaves(one, iterator)
    assert "an iterator that gives nothing: it is empty, or used up" in failure(one, iterator)


def test_wrong_number_of_inputs(one: fxopt.CapturedModule, two: fxopt.CapturedModule) -> None:
    text = failure(one, [X, (X, LABELS, LABELS)])
    assert text.startswith("item 1 of the calibration data has another structure than the inputs of the graph")
    assert "got     (f32[6, 2], i64[6], i64[6])" in text
    assert "let each item be (x, label), or only the x" in text
    text = failure(two, [X])
    assert "let each item be a tuple (ids, mask), or ((ids, mask), label), or a dict by name" in text
    assert "wanted  ids: f32[batch, 2], mask: f32[batch, 2]" in text


def test_wrong_keys(two: fxopt.CapturedModule) -> None:
    text = failure(two, [{"ids": X, "attention": X, "labels": LABELS}])
    assert "got     {'ids': f32[6, 2], 'attention': f32[6, 2], 'labels': i64[6]}" in text
    assert "a dict with the keys 'ids', 'mask'; 'attention', 'labels' would be left out" in text


def test_wrong_element_type(two: fxopt.CapturedModule) -> None:
    text = failure(two, [(X, X.long())])
    assert text.startswith("item 0 of the calibration data: input 'mask' does not fit the captured graph")
    assert "convert input 'mask' to torch.float32" in text


def test_batch_of_another_size_than_the_fixed_one() -> None:
    text = failure(fixed_batch(), [X[:4], X])
    assert "item 1 of the calibration data: input 'x' does not fit the captured graph: size 6 instead of 4" in text
    assert "capture with dynamic_shapes={'x': {0: 'batch'}}, or let the loader give batches of 4" in text


def test_batch_outside_of_the_range() -> None:
    gm = fxopt.capture(One(), (X[:4],), dynamic_shapes={"x": {0: "2<=batch<=5"}})
    text = failure(gm, [X])
    assert "batch = 6 is outside 2<=batch<=5" in text
    assert "batches of a size that 2<=batch<=5 allows" in text


def test_examples_without_a_batch_axis(one: fxopt.CapturedModule) -> None:
    assert "wrap the dataset in a DataLoader" in failure(one, TensorDataset(X, LABELS))
    assert "wrap the dataset in a DataLoader" in failure(one, list(X))


def test_an_item_of_no_rows(two: fxopt.CapturedModule) -> None:
    text = failure(two, [(X, X), (X[6:], X[6:])])
    assert text.startswith("item 1 of the calibration data: input 'ids' holds no element")


@pytest.mark.parametrize(
    ("value", "counts"), [(torch.nan, "1 NaN and 0 infinite"), (-torch.inf, "0 NaN and 1 infinite")]
)
def test_nan_and_infinity(two: fxopt.CapturedModule, value: float, counts: str) -> None:
    bad = X.clone()
    bad[3, 1] = value
    text = failure(two, [(X, X), (X, X), (X, bad)])
    assert text.startswith(f"item 2 of the calibration data: input 'mask' holds {counts} of 12 values")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (X, "these are one Tensor; pass a list of it"),
        ({"x": X}, "these are one dict"),
        (3, "an iterable, such as a DataLoader or a list, or a function that returns one; got int"),
        (lambda: 3, "the function of calibration data returned a int, not an iterable"),
    ],
)
def test_wrong_types(one: fxopt.CapturedModule, data: Any, text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        list(calibration_samples(one, data))
