"""Known architectures in integers: every layer, every residual sum; and what real weights score afterwards."""

import pytest
from torch.utils._pytree import tree_leaves

import fxopt
from fxopt.export import Session, coverage, to_onnx
from fxopt.passes import Quantize
from tests.zoo import architectures, real

pytestmark = [pytest.mark.zoo, pytest.mark.ort]

FAST = ("mobilenet_v3_small",)
LONG = (
    "resnet18",
    "mobilenet_v2",
    "resnet50",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "vit_b_16",
    "bert",
)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_every_layer_and_residual_sum_is_integer(name):
    built = architectures.build(name)
    sample = fxopt.Sample(built.args, built.kwargs)
    gm = fxopt.capture(built.model, sample, dynamic_shapes=built.dynamic_shapes)
    small = fxopt.optimize(gm, [Quantize(recipe="fast", min_sqnr_db=-100.0)], check="off", strict=True)
    report = coverage(to_onnx(small, validate=False))
    for layer in ("conv", "linear"):
        integer, every = report.kernels.get(layer, (0, 0))
        assert integer == every, str(report)
    if name not in ("vit_b_16", "bert"):  # their sums feed layer norms, which have no integer kernel
        integer, every = report.kernels.get("add", (0, 0))
        assert integer == every, str(report)


def _scored(name, batch=16, **options):
    """Return score in ORT after quantization, calibrated on 64 inputs."""
    model = real.REAL[name]
    inputs = model.inputs(64)
    batches = list(zip(*(tensor.split(batch) for tensor in inputs), strict=True))
    example = tuple(tensor[:4] for tensor in inputs)
    small = fxopt.optimize(
        model.load(), [Quantize(**options)], example, dynamic_shapes=model.dynamic_shapes, calibration=batches,
        check="samples", strict=True,
    )  # fmt: skip
    session = Session(to_onnx(small, validate=False).to_bytes())
    return model.score(lambda *given: session.run(list(given)))


@pytest.mark.parametrize(("name", "floor"), [
    ("mnist_cnn", 0.994),
    pytest.param("mobilenetv2", 0.90, marks=pytest.mark.slow),  # two of its layers lose 20 dB by rounding to nearest
    pytest.param("minilm_l6", 0.995, marks=pytest.mark.slow),  # one of its hidden units is 30 times the others
    pytest.param("crepe_tiny", 0.993, marks=pytest.mark.slow),
    pytest.param("mtcnn_onet", 0.997, marks=pytest.mark.slow),
])  # fmt: skip
def test_real_weights_keep_their_score(name, floor):
    assert _scored(name) >= floor


@pytest.mark.slow
def test_a_score_that_does_not_fall_with_the_noise_is_kept_by_the_metric_itself():
    """The place of one face reads four of the net's sixteen numbers: the quietest layer costs more than others."""
    score = real.REAL["mtcnn_onet"].score

    def overlap(model):
        return score(lambda *given: tuple(tree_leaves(model(*given))))

    assert _scored("mtcnn_onet", batch=1, metric=overlap, max_drop=0.003) >= 0.997 - 1e-4  # ORT's rounding
