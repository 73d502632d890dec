"""Training brings back what few bits cost: a CNN on real digits, trained with the ordinary loop."""

from collections.abc import Iterator

import pytest
import torch

import fxopt
from fxopt.tools.demo_net import Digits, accuracy, load_digits
from tests.bench.low_bit_digits import float_graph, low_bit, packed, trained_on
from tests.bench.zoo_table import one_thread


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Layers this small are slower with two threads, and much slower on a busy machine."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def floats(digits: Digits) -> fxopt.CapturedModule:
    return float_graph(digits, 0, epochs=6)


def share(graph: fxopt.CapturedModule, digits: Digits) -> float:
    with torch.no_grad():
        return accuracy(graph(digits.test_images), digits.test_labels)


@pytest.mark.parametrize("kind", ["table of 2", "table of 4", "ternary", "binary"])
def test_training_on_recovers_most_of_the_loss(kind: str, digits: Digits, floats: fxopt.CapturedModule) -> None:
    whole = share(floats, digits)
    assert whole > 0.95
    graph = low_bit(floats, kind)
    lost = whole - share(graph, digits)
    assert lost > 0.01, "few bits must cost something, or there is nothing to recover"
    trained = trained_on(graph, digits, 0, epochs=2)
    final = packed(trained, kind)
    assert whole - share(final, digits) < lost / 2
    with torch.no_grad():
        torch.testing.assert_close(final(digits.test_images), trained(digits.test_images), rtol=1e-5, atol=1e-5)
    assert share(floats, digits) == whole, "the float net was trained too"
