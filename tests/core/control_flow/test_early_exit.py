"""A CNN trained on real digits leaves early with a plain ``if``: captured as it is, the rest runs only where needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.eager_control_flow import observing
from fxopt.graph_module import graph_modules
from fxopt.regions import COND
from fxopt.tools.demo_net import Digits, accuracy, load_digits
from tests.models.early_exit import EarlyExitNet, WithoutExit, leaves_early, train

pytest.importorskip("sklearn")


@dataclasses.dataclass(frozen=True)
class Case:
    """A trained net, its graph, and the test images at which it leaves and at which it does not."""

    net: EarlyExitNet
    graph: fxopt.CapturedModule
    digits: Digits
    easy: Tensor
    hard: Tensor


@pytest.fixture(scope="module")
def case() -> Case:
    digits = load_digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = train(EarlyExitNet(), digits, epochs=3)
    graph = fxopt.capture(net, (digits.train_images[:2],), dynamic_shapes=({0: "batch"},))
    early = leaves_early(net, digits.test_images)
    return Case(net, graph, digits, digits.test_images[early], digits.test_images[~early])


def conv_widths(graph: Any) -> list[int]:
    """Return the output channels of the convolutions that stand in ``graph`` itself, not in a branch of it."""
    convs = [node for node in graph if node.op_type == "Conv"]
    return [node.inputs[1].const_value.shape[0] for node in convs]


def noting(taken: list[bool]) -> Any:
    """Return a context that notes the answer of every branch that runs."""
    return observing(lambda _, answer: taken.append(answer))


def test_both_ways_are_taken_and_both_heads_are_trained(case: Case) -> None:
    assert 60 < len(case.easy) < 390
    assert len(case.easy) + len(case.hard) == 450
    with torch.no_grad():
        scores = torch.cat([case.graph(image) for image in case.digits.test_images.split(1)])
        early, final = case.net.both(case.digits.test_images)
    labels = case.digits.test_labels
    assert accuracy(scores, labels) > 0.97
    assert accuracy(early, labels) < accuracy(final, labels)


def test_training_repeats() -> None:
    digits = load_digits()
    few = dataclasses.replace(digits, train_images=digits.train_images[:128], train_labels=digits.train_labels[:128])
    nets = []
    for _ in range(2):
        torch.manual_seed(1)
        nets.append(train(EarlyExitNet(), few, seed=3, epochs=1))
    first, second = (net.state_dict().values() for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_graph_equals_the_net_bit_for_bit_on_easy_and_hard_images(case: Case) -> None:
    taken: list[bool] = []
    with torch.no_grad(), noting(taken):
        for images in (case.easy[:60], case.hard[:60]):
            for image in images.split(1):
                assert torch.equal(case.graph(image), case.net(image))
    assert taken == [True] * 60 + [False] * 60


def test_batch_leaves_only_when_every_image_may(case: Case) -> None:
    mixed = torch.cat([case.easy[:4], case.hard[:1]])
    taken: list[bool] = []
    with torch.no_grad(), noting(taken):
        for batch in (case.easy[:3], mixed, case.hard[:5], mixed.flip(0)):
            assert torch.equal(case.graph(batch), case.net(batch))
    assert taken == [True, False, False, False]


def test_exit_is_one_branch_and_the_heavy_part_is_inside(case: Case) -> None:
    (cond,) = [node for node in case.graph.graph.nodes if node.target is COND]
    assert "early_exit.py" in (fxopt.source_line(cond) or "")
    outside = [node for node in case.graph.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    everywhere = [
        node
        for module in graph_modules(case.graph)
        for node in module.graph.nodes
        if node.target is torch.ops.aten.conv2d.default
    ]
    assert (len(outside), len(everywhere)) == (2, 9)


@pytest.mark.ort
def test_onnx_runtime_predicts_as_the_net(case: Case, tmp_path: Any) -> None:
    from fxopt.export import Session, to_onnx

    to_onnx(case.graph, tmp_path / "net.onnx")
    for level in ("none", "all"):
        session = Session(tmp_path / "net.onnx", optimization=level, threads=1)
        with torch.no_grad():
            for images in (case.easy[:60], case.hard[:60]):
                got = torch.cat([session.run([image])[0] for image in images.split(1)])
                want = torch.cat([case.net(image) for image in images.split(1)])
                assert torch.equal(got.argmax(1), want.argmax(1))
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.ort
def test_heavy_convolutions_stand_inside_the_if(case: Case, tmp_path: Any) -> None:
    from fxopt.export import to_onnx

    graph = to_onnx(case.graph, tmp_path / "net.onnx").model.graph
    assert conv_widths(graph) == [16, 16]  # the stem
    (branch,) = [node for node in graph if node.op_type == "If"]
    sides = {name: attribute.value for name, attribute in branch.attributes.items()}
    assert conv_widths(sides["then_branch"]) == []
    assert conv_widths(sides["else_branch"]) == [32] * 7


@pytest.mark.ort
def test_net_without_the_exit_has_all_in_the_main_graph(case: Case, tmp_path: Any) -> None:
    from fxopt.export import to_onnx

    graph = fxopt.capture(WithoutExit(case.net), (case.hard[:2],), dynamic_shapes=({0: "batch"},))
    model = to_onnx(graph, tmp_path / "net.onnx").model
    assert conv_widths(model.graph) == [16, 16] + [32] * 7
    assert not [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "If"]
    with torch.no_grad():  # on hard images both nets run the same
        assert torch.equal(graph(case.hard[:5]), case.net(case.hard[:5]))
