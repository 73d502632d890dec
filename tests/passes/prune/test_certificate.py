"""The proof that a shrunk graph computes what the masked one does, and that the proof can fail."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes import Prune, ShrinkMasked
from fxopt.passes.prune import shrink_masked
from fxopt.passes.prune.certificate import Certificate, certify, difference
from fxopt.passes.prune.cut import Cut
from tests.models.randomized import randomized
from tests.passes.prune.nets import Residual


@pytest.fixture
def gm():
    return fxopt.capture(randomized(Residual(8, 4)).eval(), (torch.randn(2, 3, 6, 6),), dynamic_shapes=({0: "batch"},))


@pytest.fixture
def careless_cut(monkeypatch):
    """Cuts another channel of one weight than of what it is multiplied with."""
    whole = Cut._cut_attribute

    def rolled(self, node):
        whole(self, node)
        if node.target == "body.weight" and not torch.equal(tensor := self._resizing.tensor(node), tensor.roll(1, 1)):
            self._resizing._new[id(self._resizing._rw.tensor(node))] = nn.Parameter(tensor.detach().roll(1, 1))

    monkeypatch.setattr(Cut, "_cut_attribute", rolled)


def test_random_masks_of_every_layer_give_the_same_function(gm):
    found = certify(gm, runs=10, seed=3)
    assert len(found.errors) == 10
    assert found.failures == 0
    assert sum(found.left) == 0
    assert found.worst < 1e-5
    assert len(set(found.kept)) > 5
    assert min(found.kept) < 0.5


def test_certificate_is_the_same_for_the_same_seed(gm):
    assert certify(gm, runs=3, seed=1) == certify(gm, runs=3, seed=1)
    assert certify(gm, runs=3, seed=1).kept != certify(gm, runs=3, seed=2).kept


def test_graph_is_left_alone(gm):
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    certify(gm, runs=2)
    assert gm.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_certificate_counts_a_wrong_cut(gm, careless_cut):
    found = certify(gm, runs=4)
    assert found.failures >= 2  # where one channel is left, there is no other one to take
    assert "above 1e-04" in str(found)


def test_pass_with_a_wrong_cut_is_undone_and_says_so(gm, careless_cut):
    masked = Prune(0.5)(gm).gm
    with pytest.raises(fxopt.PassError, match=r"another function of the graph with the masks of the graph\n.*relative"):
        ShrinkMasked()(masked)
    kept = fxopt.optimize(masked, passes=["shrink-masked"])
    assert kept.get_parameter("body.weight").shape == (8, 8, 3, 3)
    assert kept.report.steps[0].status == "failed"


def test_wrong_cut_that_only_other_masks_show_is_found(gm, monkeypatch):
    masked = Prune(0.5)(gm).gm
    monkeypatch.setattr(shrink_masked, "certify", lambda *args, **options: Certificate((1.0,), (0.5,), (0,)))
    with pytest.raises(fxopt.PassError, match="with random masks"):
        ShrinkMasked()(masked)


def test_report_has_the_certificate(gm):
    notes = fxopt.optimize(gm, passes=[Prune(0.5), ShrinkMasked(random_masks=3)], strict=True).report.steps[1].notes
    assert any("parameters became" in note for note in notes)
    assert any("3 random mask sets" in note and "0 above 1e-04" in note for note in notes)


def test_nothing_to_remove_changes_nothing_and_says_nothing(gm):
    result = ShrinkMasked()(gm)
    assert not result.modified
    assert result.notes == ()


def test_difference_sees_shapes_and_nan():
    ones = torch.ones(2)
    assert difference([ones], [ones]) == 0
    assert difference([ones], [ones * 1.5]) == 0.5
    assert difference([ones], [torch.ones(3)]) == float("inf")
    assert difference([ones], [ones * torch.nan]) == float("inf")


def test_negative_number_of_mask_sets_is_refused():
    with pytest.raises(ValueError, match="random_masks is -1; wanted 0 or more"):
        ShrinkMasked(random_masks=-1)
