"""The demo as people run it: real digits in, a proved ONNX file and an honest table out; a wrong graph ends it."""

import re
import sys

import pytest
import torch

import fxopt
from fxopt.export import Session
from fxopt.tools import demo
from fxopt.tools.demo_net import Digits, DigitsNet, accuracy, load_digits, train

pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")
pytestmark = pytest.mark.ort


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def model(digits) -> DigitsNet:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = train(digits)
    torch.set_num_threads(threads)
    return trained


@pytest.fixture
def ready(monkeypatch, digits, model):
    """Give the demo the net trained once, and few rounds of timing."""
    monkeypatch.setattr(demo, "train", lambda given: model)
    monkeypatch.setattr(demo, "_ROUNDS", 3)


def row(text: str, label: str) -> tuple[float, float]:
    """Return the numbers before and after in the line of the table that starts with ``label``."""
    (line,) = (line for line in text.splitlines() if label in line)
    before, after = (float(re.sub(r"[^\d.e+-]", "", cell)) for cell in re.split("[│|]", line)[2:4])
    return before, after


def test_test_digits_are_not_among_those_trained_on(digits):
    assert (len(digits.train_labels), len(digits.test_labels)) == (1347, 450)
    seen = {tuple(image.flatten().tolist()) for image in digits.train_images}
    assert sum(tuple(image.flatten().tolist()) in seen for image in digits.test_images) == 0
    assert digits.train_images.max() == 1
    assert digits.train_images.min() == 0


def test_training_repeats_and_leaves_the_random_state_alone(digits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = train(digits, epochs=1), train(digits, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_training_learns_the_digits(digits, model):
    with torch.no_grad():
        assert accuracy(model(digits.test_images), digits.test_labels) > 0.97


def test_demo_writes_a_proved_model_of_any_batch(ready, digits, model, tmp_path, capsys):
    assert demo.run(tmp_path / "new" / "folder") == 0
    path = tmp_path / "new" / "folder" / "digits.onnx"
    session = Session(path)
    for images in (digits.test_images, digits.test_images[:1]):
        (scores,) = session.run([images])
        with torch.no_grad():
            torch.testing.assert_close(scores, model(images), rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().out
    assert str(path) in said.replace("\n", "")
    assert "fold-batch-norm" in said
    assert row(said, "accuracy, ORT")[1] == pytest.approx(
        100 * accuracy(session.run([digits.test_images])[0], digits.test_labels), abs=0.01
    )


def test_demo_shows_what_the_passes_saved(ready, tmp_path, capsys):
    assert demo.run(tmp_path) == 0
    said = capsys.readouterr().out
    for label in ("graph nodes", "ONNX nodes", "parameters and buffers"):
        before, after = row(said, label)
        assert after < before, label
    assert (tmp_path / "digits.onnx").stat().st_size < (tmp_path / "before.onnx").stat().st_size
    assert max(row(said, "largest error")) < 1e-3


def test_demo_restores_the_number_of_threads(ready, tmp_path):
    before = torch.get_num_threads()
    demo.run(tmp_path)
    assert torch.get_num_threads() == before


def test_demo_refuses_a_graph_that_computes_something_else(ready, monkeypatch, tmp_path, capsys):
    def spoiled(gm: fxopt.CapturedModule) -> fxopt.CapturedModule:
        def double(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
            (output,) = module.graph.find_nodes(op="output")
            (scores,) = output.args[0]
            with module.graph.inserting_before(output):
                twice = module.graph.call_function(torch.ops.aten.add.Tensor, (scores, scores))
            twice.meta["val"] = scores.meta["val"]
            output.args = ((twice,),)
            module.recompile()
            return module

        return double(gm.clone())

    monkeypatch.setattr(fxopt, "optimize", spoiled)
    assert demo.run(tmp_path) == 1
    assert "breaks contract ROUNDING" in capsys.readouterr().err
    assert not (tmp_path / "digits.onnx").exists()


def test_demo_without_scikit_learn_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert demo.run(tmp_path) == 1
    assert "pip install 'fxopt[demo]'" in capsys.readouterr().err


def test_demo_says_that_it_cannot_write(ready, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file, not a folder")
    assert demo.run(tmp_path / "taken") == 1
    assert "taken" in capsys.readouterr().err


def test_command_line_hands_over_the_folder(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(demo, "run", lambda output: given.append(output) or 0)
    assert (demo.main(["--output", str(tmp_path)]), demo.main([])) == (0, 0)
    assert given == [tmp_path, None]
