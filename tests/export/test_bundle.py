"""A bundle verifies where it was not made; each kind of damage is named."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.errors import BundleError, ExportError
from fxopt.export import verify_bundle, write_bundle
from tests.export.chaotic import stable_where_trained
from tests.export.faults import faults
from tests.models.randomized import randomized

pytestmark = pytest.mark.ort


def net():
    torch.manual_seed(0)
    return randomized(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))).eval()


@pytest.fixture
def bundle(tmp_path):
    gm = fxopt.optimize(net(), example_inputs=(torch.randn(3, 64),), dynamic_shapes=({0: "batch"},))
    return write_bundle(gm, tmp_path / "bundle", external_data="always")


def test_it_verifies_in_a_fresh_process(bundle):
    code = "import sys; from fxopt.export import verify_bundle; print(verify_bundle(sys.argv[1]))"
    said = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True).stdout
    assert "is intact, and ONNX Runtime agrees: contract ROUNDING" in said


def test_it_holds_what_is_promised(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {each.name for each in bundle.iterdir()} == {"manifest.json", "model.onnx", "model.onnx.data", "vectors.npz"}
    assert manifest["inputs"] == [{"name": "input_1", "dtype": "float", "shape": ["batch", 64]}]
    assert manifest["contract"] == "ROUNDING"
    assert {"fxopt", "torch", "onnx", "onnxruntime"} <= set(manifest["versions"])
    assert len({row["label"] for row in manifest["vectors"]}) == len(manifest["vectors"]) > 3
    recorded = manifest["files"]["model.onnx.data"]["sha256"]
    assert recorded == hashlib.sha256((bundle / "model.onnx.data").read_bytes()).hexdigest()


def test_vectors_are_eager_outputs(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    model = net()
    with np.load(bundle / "vectors.npz") as arrays, torch.no_grad():
        for number in range(len(manifest["vectors"])):
            want = model(torch.from_numpy(arrays[f"{number}.in.0"]))
            torch.testing.assert_close(torch.from_numpy(arrays[f"{number}.out.0"]), want, rtol=1e-5, atol=1e-5)


def test_a_lossy_model_keeps_its_floor(tmp_path):
    gm = fxopt.optimize(net(), [passes.QuantizeDynamic(min_sqnr_db=20)], example_inputs=(torch.randn(3, 64),))
    report = verify_bundle(write_bundle(gm, tmp_path / "bundle")).validation
    assert report.contract == "LOSSY(sqnr_db >= 20)"


def test_half_precision_and_its_vectors(tmp_path):
    gm = fxopt.capture(net().bfloat16(), (torch.randn(3, 64).bfloat16(),))
    assert verify_bundle(write_bundle(gm, tmp_path / "bundle")).validation.runs > 0


def test_other_versions_are_told(bundle):
    edit(bundle, lambda manifest: manifest["versions"].update(torch="1.0"))
    found = verify_bundle(bundle)
    assert found.differences == {"torch": ("1.0", str(torch.__version__))}
    assert "torch 1.0 there" in str(found)


def edit(bundle, change):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def write_over(bundle, name, content):
    (bundle / name).write_bytes(content)


def flip(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    write_over(bundle, name, bytes(content))


def sign_again(bundle):
    """Let the manifest say of each file what is true of it now."""

    def change(manifest):
        for name, recorded in manifest["files"].items():
            content = (bundle / name).read_bytes()
            recorded.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit(bundle, change)


def with_another_operator(bundle):
    model = ir.load(bundle / "model.onnx")
    fault = next(fault for fault in faults(model) if fault.kind == "weight")
    ir.save(fault.planted(model), bundle / "model.onnx")
    sign_again(bundle)


def with_another_output(bundle):
    model = ir.load(bundle / "model.onnx")
    model.graph.outputs[0].name = "other"
    ir.save(model, bundle / "model.onnx")
    sign_again(bundle)


def without_a_vector(bundle):
    with np.load(bundle / "vectors.npz") as arrays:
        kept = {name: array for name, array in arrays.items() if name != "1.out.0"}
    np.savez(bundle / "vectors.npz", **kept)
    sign_again(bundle)


def with_a_broken_model(bundle):
    write_over(bundle, "model.onnx", b"no model")
    sign_again(bundle)


DAMAGE = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (
        lambda b: write_over(b, "manifest.json", b'{"format": "fx'),
        "manifest.json is damaged: it is no JSON",
    ),
    "another manifest": (lambda b: write_over(b, "manifest.json", b"{}"), "manifest.json is not that of a bundle"),
    "newer": (lambda b: edit(b, lambda m: m.update(version=9)), "manifest.json has another version"),
    "field gone": (lambda b: edit(b, lambda m: m.pop("contract")), "'contract' is missing"),
    "no contract": (lambda b: edit(b, lambda m: m.update(contract="fine")), "'fine' is no contract"),
    "model gone": (lambda b: (b / "model.onnx").unlink(), "model.onnx is missing"),
    "weights gone": (lambda b: (b / "model.onnx.data").unlink(), "model.onnx.data is missing"),
    "weights cut": (
        lambda b: write_over(b, "model.onnx.data", b"0"),
        "model.onnx.data is damaged: its size is another",
    ),
    "a bit of the weights": (lambda b: flip(b, "model.onnx.data"), "model.onnx.data is damaged: its SHA-256"),
    "a bit of the vectors": (lambda b: flip(b, "vectors.npz"), "vectors.npz is damaged: its SHA-256"),
    "vector gone": (without_a_vector, "vectors.npz does not fit manifest.json"),
    "no vectors": (lambda b: edit(b, lambda m: m.update(vectors=[])), "it has no vectors"),
    "no model at all": (with_a_broken_model, "model.onnx cannot be loaded"),
    "another interface": (with_another_output, "model.onnx has other outputs than manifest.json says"),
    "another function": (with_another_operator, "computes something else than when the bundle was made"),
    "a path": (lambda b: edit(b, lambda m: m["files"].update({"../x": {}})), "'../x' is no file of the bundle"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(bundle, kind):
    damage, message = DAMAGE[kind]
    verify_bundle(bundle)
    damage(bundle)
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle)
    assert message in str(caught.value)


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    gm = fxopt.capture(net(), (torch.randn(3, 64),))
    with pytest.raises(ExportError, match="is there already"):
        write_bundle(gm, tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_is_left_of_a_bundle_that_fails(tmp_path):
    gm = fxopt.capture(nn.Dropout(), (torch.randn(3, 64),)).train()
    with pytest.raises(ExportError, match="train mode"):
        write_bundle(gm, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_vectors_are_of_inputs_on_which_rounding_does_not_decide(tmp_path):
    write_bundle(stable_where_trained(), tmp_path / "bundle")
    labels = [row["label"] for row in json.loads((tmp_path / "bundle" / "manifest.json").read_text())["vectors"]]
    assert "other values near the example's" in labels
    assert "other values" not in labels
    verify_bundle(tmp_path / "bundle")
