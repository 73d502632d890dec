"""Which of ORT's optimizers changes the outputs."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.contracts import Contract
from fxopt.errors import ExportError
from fxopt.export import Session, bisect_ort, to_onnx
from tests.models.randomized import randomized

pytestmark = pytest.mark.ort
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net():
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 5)
    return randomized(nn.Sequential(*layers)).eval()


@pytest.fixture(scope="module")
def integers():
    gm = fxopt.optimize(net(), [passes.Quantize(recipe="fast")], example_inputs=(IMAGES,))
    return to_onnx(gm)


def test_the_fusion_of_integers_is_named_for_rounding_otherwise(integers):
    found = bisect_ort(integers, [IMAGES], Contract.EXACT)
    assert found.optimizer is not None
    assert "QDQ" in found.optimizer
    assert found.level in ("basic", "extended")


def test_without_what_is_named_the_check_is_good(integers):
    found = bisect_ort(integers, [IMAGES], Contract.EXACT)
    names = list(found.modified)
    left_out = names[: names.index(found.optimizer) + 1]
    (plain,) = Session(integers.to_bytes(), optimization="none").run([IMAGES])
    for disabled, equal in ((left_out, True), (left_out[:-1], False)):
        (got,) = Session(integers.to_bytes(), optimization=found.level, disabled=disabled).run([IMAGES])
        assert torch.equal(got, plain) is equal


def test_a_users_check_decides(integers):
    (plain,) = Session(integers.to_bytes(), optimization="none").run([IMAGES])
    found = bisect_ort(integers, [IMAGES], lambda outputs: torch.equal(outputs[0], plain))
    assert found.reason == "it returned False"
    assert str(found.optimizer) in str(found)


def test_rounding_of_floats_is_no_fault():
    file = to_onnx(fxopt.capture(net(), (IMAGES,)))
    with pytest.raises(ExportError, match="good at every level"):
        bisect_ort(file, [IMAGES])


def test_a_file_that_is_bad_by_itself_is_refused(integers):
    with pytest.raises(ExportError, match="bad without ORT's optimizer"):
        bisect_ort(integers, [IMAGES], lambda outputs: False)


def test_nothing_of_the_log_is_shown(integers, capfd):
    bisect_ort(integers, [IMAGES], Contract.EXACT)
    assert capfd.readouterr() == ("", "")
