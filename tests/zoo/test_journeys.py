"""Known models go the whole way: captured with free sizes, optimized, exported, and equal in ONNX Runtime."""

import math

import pytest
import torch

import fxopt
from fxopt.export import Session, to_onnx, validate
from tests.zoo import journeys, real, weights
from tests.zoo.architectures import TRANSFORMERS

pytestmark = [pytest.mark.zoo, pytest.mark.ort]

QUICK = {"densenet_small", "bert", "LstmNet", "Dlrm"}
TEXT_AND_SOUND = {*TRANSFORMERS, *journeys.RECURRENT}  # nets whose length varies too
SLOW_SCORES = {"crepe_full", "mobilenetv2"}
FLOOR_DB = 70.0  # of ORT against eager: random nets amplify rounding, and one that drowns in it would prove nothing
ONE_ANSWER = 1e-4  # less than one digit of 5,000, one tone of 240 or one pair of crops counts


def marked(names, quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", marked((*journeys.SMALL, *journeys.NAMES), QUICK))
def test_model_computes_the_same_in_ort_at_any_size(name):
    journey = journeys.travel(journeys.build(name))
    report = journey.validation
    free = {"batch"} | ({"length"} if name in TEXT_AND_SOUND else set())
    assert free <= set(journey.captured.dims)
    assert report.contract == "ROUNDING"
    assert {result.optimization for result in report.results} == {"none", "all"}
    if name not in journeys.RECOMMENDERS:  # whose offsets and ids cannot be cut to any size
        assert report.notes == []
        assert set(sizes(free, report)) == {1, 2, 5}
    on_the_sample = [result.errors.sqnr_db for result in report.results if result.case == "sample 0"]
    assert min(on_the_sample) > FLOOR_DB
    before, after, exported = journey.nodes
    assert after <= before
    assert exported <= 1.4 * after  # a bag of embeddings is a loop in ONNX
    if "length" in free:
        check_that_sizes_vary_apart(journey)


def sizes(free, report):
    """Yield the sizes that were compared: the size in "batch = 1, length = 1", and the 2 of the example."""
    yield 2
    for case in {result.case for result in report.results} - {"sample 0", "other values"}:
        found = dict(part.split(" = ") for part in case.split(", "))
        assert set(found) == free
        yield from map(int, found.values())


def check_that_sizes_vary_apart(journey):
    gm = journey.optimized
    for batch, length in ((3, 1), (1, 9)):
        sample = gm.resized({"batch": batch, "length": length})
        assert validate(journey.file, gm, inputs=[sample], sizes=False).runs == 2
        outputs = journey.file.session().run([leaf for leaf in sample.leaves() if isinstance(leaf, torch.Tensor)])
        assert any(output.shape[:2] == (batch, length) for output in outputs)


def ort_of(model, *inputs, dynamic_shapes):
    """Export a real model with the default passes, and return it as a ``Predict`` that runs in ORT."""
    gm = fxopt.optimize(model, example_inputs=inputs, dynamic_shapes=dynamic_shapes, strict=True)
    file = to_onnx(gm)
    assert file.validation is not None
    assert file.validation.notes == []
    session = Session(file.to_bytes())
    return lambda *batch: session.run(batch)


@pytest.mark.parametrize("name", marked(real.REAL, set(real.REAL) - SLOW_SCORES))
def test_score_of_real_weights_is_the_same_in_ort(name):
    model = real.REAL[name]
    predict = ort_of(model.load(), *model.inputs(2), dynamic_shapes=model.dynamic_shapes)
    score = model.score(predict)
    assert score == pytest.approx(model.score(real.eager(model.load())), abs=ONE_ANSWER)
    assert score == pytest.approx(model.fp32, abs=5e-4)


def test_face_is_found_with_two_stages_in_ort():
    stages = [real.eager(weights.mtcnn("PNet"))]  # its images have any size, which its graph does not allow
    for stage in ("RNet", "ONet"):
        model = real.REAL[f"mtcnn_{stage.lower()}"]
        stages.append(ort_of(model.load(), *model.inputs(2), dynamic_shapes=model.dynamic_shapes))
    assert math.isclose(real.cascade_iou(*stages), 1.0, abs_tol=1e-4)
