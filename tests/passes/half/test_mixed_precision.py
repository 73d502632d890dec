"""Training in half precision: what computes in which type, float32 masters, scaled losses, and what comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.passes import CastHalf, MixedPrecision, PrecisionPlan, Prune
from fxopt.testing import check_pass
from tests.distributed.cases import Recurrent

HALVES = (torch.float16, torch.bfloat16)
X = torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(2))


class Attends(nn.Module):
    """One layer of a transformer by hand: attention with its softmax, norm, GELU, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.up, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5, -1)
        x = self.norm(x + weights @ self.value(x))
        return self.head(F.gelu(self.up(x)).amax(1))


class Normed(nn.Module):
    """Convolution, batch norm, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x)).relu().amax(2)))


class Gated(nn.Module):
    """A branch whose sides both have a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu().amax(1)
        if x.mean() > 0:
            return self.left(y)
        return self.right(y) * 2


NETS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attends, "convolution": Normed, "recurrent": Recurrent, "branch": Gated,
}  # fmt: skip


def captured(net: Callable[[], nn.Module], x: Tensor = X) -> fxopt.CapturedModule:
    torch.manual_seed(0)
    return fxopt.capture(net().train(), (x,), dynamic_shapes=({0: "batch"},))


def mixed(gm: fxopt.CapturedModule, dtype: Any, **options: Any) -> fxopt.CapturedModule:
    return MixedPrecision(dtype, **options)(gm.clone(copy_tensors=True)).gm.train()


def train(
    model: Any,
    *,
    steps: int = 20,
    scaler: torch.amp.GradScaler | None = None,
    context: Callable[[], Any] = contextlib.nullcontext,
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with context():
            scores = model(X)
        loss = F.cross_entropy(scores.float(), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


# ---- the plan


def test_products_are_in_half_and_softmax_and_norms_in_float32() -> None:
    plan = MixedPrecision().make_plan(captured(Attends))
    types = {str(dtype).removeprefix("torch."): [] for dtype in plan.values()}
    for name, dtype in plan.items():
        types[str(dtype).removeprefix("torch.")].append(name)
    assert types == {
        "bfloat16": ["linear", "linear_1", "transpose", "matmul", "div", "linear_2", "matmul_1", "linear_3", "gelu",
                     "amax", "linear_4"],
        "float32": ["softmax", "add", "layer_norm"],
    }  # fmt: skip
    assert plan.reasons["softmax"].startswith("softmax loses digits or range in half (test_mixed_precision.py:")
    assert plan.reasons["add"].startswith("it reads x in float32")


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [("aten.linear", 5), ("query", 1), ("linear_2", 1), ("linear*", 5)],
)
def test_what_is_kept_stays_float32_with_that_reason(pattern: str, kept: int) -> None:
    plan = MixedPrecision(keep=(pattern,)).make_plan(captured(Attends))
    found = [node for node, reason in plan.reasons.items() if reason.startswith("it is kept by the user")]
    assert len(found) == kept
    assert all(plan[node] is torch.float32 for node in found)


def test_a_plan_by_calibration_keeps_what_overflows() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.dropout = nn.Linear(8, 64), nn.Linear(64, 64), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.second(self.dropout(self.first(x) * 1e6) / 1e6)).amax(1)

    gm = captured(Wide)
    assert MixedPrecision("float16").make_plan(gm)["mul"] is torch.float16
    plan = MixedPrecision("float16", by="calibration").make_plan(gm)
    assert plan["mul"] is torch.float32
    assert plan["linear_2"] is torch.float16
    assert mixed(gm, "float16", by="calibration")(X).isfinite().all()


def test_an_edited_plan_is_applied_as_it_stands() -> None:
    gm = captured(Attends)
    plan = MixedPrecision("float16").make_plan(gm).changed("linear_3", "gelu", dtype="float32", reason="mine")
    found = {
        node.name: node.meta["val"].dtype for node in mixed(gm, "float16", plan=plan).graph.nodes if "val" in node.meta
    }
    assert found["linear_3"] is found["gelu"] is torch.float32
    assert found["linear_4"] is found["matmul"] is torch.float16


def test_quantized_regions_stay_as_they_are_and_masks_are_multiplied_in_float32() -> None:
    gm = Prune(0.5, "weights", min_sqnr_db=-1000.0)(captured(Attends)).gm
    result = MixedPrecision("float16")(gm)
    products = [node for node in result.gm.graph.nodes if node.name.startswith("mul_tensor")]
    assert len(products) == 5
    assert all(node.meta["val"].dtype is torch.float32 for node in products)
    quantized = fxopt.passes.PrepareQat()(gm).gm
    assert not any(name.startswith("linear") for name in MixedPrecision().make_plan(quantized).half)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_keeps_what_every_pass_owes(net: str, dtype: torch.dtype) -> None:
    check_pass(MixedPrecision(dtype), captured(NETS[net]))


# ---- masters


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_parameters_gradients_and_statistics_are_float32_and_load_into_the_model(net: str, dtype: torch.dtype) -> None:
    gm = captured(NETS[net])
    half = mixed(gm, dtype)
    train(half, steps=2)
    for parameter in half.parameters():
        assert parameter.dtype is torch.float32
        assert parameter.grad is None or parameter.grad.dtype is torch.float32
    assert any(
        node.meta["val"].dtype is dtype
        for node in half.graph.nodes
        if node.op == "call_function" and "linear" in node.name
    )
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in half.buffers())
    model = NETS[net]()
    model.load_state_dict(half.state_dict())
    with torch.no_grad():
        want, got = model.eval()(X), half.eval()(X)
    torch.testing.assert_close(got, want, rtol=0, atol=8 * torch.finfo(dtype).eps * float(want.abs().max()))


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(HALVES), st.integers(0, 1000))
def test_a_layer_computes_in_half_and_its_gradient_is_the_half_one_in_float32(
    inputs: int, outputs: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = nn.Linear(inputs, outputs), torch.randn(4, inputs)
    half = mixed(fxopt.capture(layer, (x,)), dtype)
    y = half(x)
    y.square().sum().backward()
    weight, bias = (p.detach().to(dtype).requires_grad_() for p in layer.parameters())
    want = F.linear(x.to(dtype), weight, bias)
    want.float().square().sum().backward()
    assert torch.equal(y, want.float())
    for parameter, reference in zip(half.parameters(), (weight, bias), strict=True):
        assert parameter.grad is not None
        assert reference.grad is not None
        assert torch.equal(parameter.grad, reference.grad.float())


# ---- training


@pytest.mark.parametrize("net", ["attention", "convolution"])
@pytest.mark.parametrize("dtype", HALVES)
def test_losses_are_those_of_autocast_within_its_own_noise(net: str, dtype: torch.dtype) -> None:
    gm = captured(NETS[net])
    reference = train(gm.clone(copy_tensors=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is torch.float16)
    eager = NETS[net]().train()
    eager.load_state_dict(gm.state_dict())
    autocast = train(eager, scaler=scaler, context=lambda: torch.autocast("cpu", dtype))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype is torch.float16)
    graph = train(mixed(gm, dtype), scaler=scaler)
    noise = max(abs(a - b) for a, b in zip(reference, autocast, strict=True))
    worst = max(abs(a - b) for a, b in zip(reference, graph, strict=True))
    assert worst <= 3 * max(noise, torch.finfo(dtype).eps)  # another sample of noise of the same size
    assert graph[-1] < 0.8 * graph[0]


def test_modes_switch_in_the_graph() -> None:
    half = mixed(captured(lambda: Normed(dropout=0.5)), "bfloat16")
    assert not torch.equal(half(X), half(X))
    assert torch.equal(half.eval()(X), half(X))
    assert not torch.equal(half.train()(X), half(X))


def test_statistics_are_those_of_float32_within_the_rounding_of_what_they_are_taken_of() -> None:
    gm = captured(Normed)
    half, plain = mixed(gm, "float16"), gm.clone(copy_tensors=True)
    for model in (half, plain):
        model(X)
    eps = torch.finfo(torch.float16).eps
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(half.get_buffer(name), plain.get_buffer(name), rtol=4 * eps, atol=4 * eps)
    assert int(half.get_buffer("norm.num_batches_tracked")) == 1


def test_an_overflow_skips_the_step_halves_the_scale_and_training_goes_on() -> None:
    half = mixed(captured(Attends), "float16")
    optimizer = torch.optim.SGD(half.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    scales, losses, moved = [], [], []
    for _ in range(40):
        before = half.head.weight.detach().clone()  # type: ignore[union-attr]  # a parameter of the graph
        optimizer.zero_grad()
        loss = F.cross_entropy(half(X), Y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        moved.append(not torch.equal(before, half.head.weight))  # type: ignore[arg-type]  # a parameter of the graph
        losses.append(loss.item())
    skipped = moved.index(True)
    assert 3 < skipped < 30
    assert all(moved[skipped:])
    assert scales[: skipped + 1] == [2.0 ** (30 - step) for step in range(skipped + 1)]
    assert set(scales[skipped:]) == {scales[skipped]}
    assert losses[-1] < losses[skipped]
    assert all(parameter.isfinite().all() for parameter in half.parameters())


def test_a_batch_that_overflows_is_skipped_and_leaves_nothing_behind() -> None:
    half = mixed(captured(Attends), "float16")
    optimizer, scaler = torch.optim.Adam(half.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    scaler.scale(F.cross_entropy(half(X * 1e6), Y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(before[name], tensor) for name, tensor in half.state_dict().items())
    losses = train(half, scaler=scaler)
    assert losses[-1] < 0.9 * losses[0]


# ---- afterwards


@pytest.fixture(scope="module")
def trained() -> tuple[fxopt.CapturedModule, fxopt.CapturedModule]:
    """The graph in float32, and the one in half that was trained; they share parameters."""
    gm = captured(Attends)
    half = MixedPrecision("float16")(gm).gm.train()
    train(half, steps=5)
    return gm.eval(), half.eval()


@pytest.mark.ort
def test_a_trained_graph_exports_as_it_stands(trained: tuple[fxopt.CapturedModule, ...], tmp_path: Any) -> None:
    to_onnx(trained[1], tmp_path / "mixed.onnx")
    (got,) = Session(tmp_path / "mixed.onnx").run([X[:3]])
    with torch.no_grad():
        torch.testing.assert_close(got, trained[1](X[:3]), rtol=0, atol=8 * torch.finfo(torch.float16).eps)


@pytest.mark.ort
def test_casts_of_weights_fold_into_weights_in_half(trained: tuple[fxopt.CapturedModule, ...], tmp_path: Any) -> None:
    folded = fxopt.optimize(trained[1], ["freeze-mode", "fold-constants{parameters=true}"], strict=True)
    with torch.no_grad():
        assert torch.equal(folded(X), trained[1](X))
    weights = [tensor for tensor in (*folded.parameters(), *folded.buffers()) if tensor.ndim == 2]
    assert len(weights) == 5
    assert all(tensor.dtype is torch.float16 for tensor in weights)
    to_onnx(folded, tmp_path / "folded.onnx")


@pytest.mark.ort
def test_the_graph_in_float32_has_the_trained_weights_and_casts_to_half(
    trained: tuple[fxopt.CapturedModule, ...], tmp_path: Any
) -> None:
    small = fxopt.optimize(trained[0], [CastHalf("float16")], strict=True)
    to_onnx(small, tmp_path / "half.onnx")
    with torch.no_grad():
        torch.testing.assert_close(small(X), trained[1](X), rtol=0, atol=16 * torch.finfo(torch.float16).eps)


# ---- refusals


def test_refuses_a_graph_of_one_mode() -> None:
    gm = fxopt.optimize(captured(Normed).eval(), ["freeze-mode"])
    with pytest.raises(fxopt.PassError, match="valid in eval mode only, and mixed-precision is for training"):
        MixedPrecision()(gm)


def test_refuses_a_graph_without_floats() -> None:
    gm = fxopt.capture(lambda x: x + 1, (torch.arange(3),))
    with pytest.raises(fxopt.PassError, match="no operator of the graph can compute in bfloat16"):
        MixedPrecision()(gm)


def test_refuses_a_plan_of_another_graph() -> None:
    with pytest.raises(fxopt.PassError, match="the plan names 'elsewhere'"):
        MixedPrecision(plan=PrecisionPlan({"elsewhere": torch.float16}))(captured(Normed))


def test_refuses_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(fxopt.PassError, match="no node, operator or module fits 'nothing'"):
        MixedPrecision(keep=("nothing",))(captured(Normed))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": "float64"}, ValueError, "wanted float16 or bfloat16"),
        ({"by": "chance"}, ValueError, "by is 'chance'; wanted one of operators, calibration"),
        ({"plan": {"linear": torch.float16}}, TypeError, "wanted a PrecisionPlan"),
        ({"plan": PrecisionPlan({}), "keep": ("linear",)}, ValueError, "leave out keep"),
    ],
)
def test_refuses_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MixedPrecision(**options)
