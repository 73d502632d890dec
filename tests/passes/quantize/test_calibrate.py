"""Calibration sees every value once, forgets it, and gives the same however the data are split."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import CalibrationError
from fxopt.errors import FileFormatError
from fxopt.passes.quantize.calibrate import calibrate
from fxopt.passes.quantize.sketch import ValueSketch
from tests.distributed.launch import run_in_processes

BATCH = ({0: "batch"},)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).softmax(-1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = self.linear(x).tanh()
        else:
            x = x.cos()
        while x.abs().max() > 0.25:
            x = x * 0.5
        return x


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        return torch.log(y).relu()


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def captured(net: nn.Module, x: Tensor) -> fxopt.CapturedModule:
    return fxopt.capture(net.eval(), (x,), dynamic_shapes=BATCH)


def floats(gm: fxopt.CapturedModule) -> list[str]:
    return [
        node.name
        for node in gm.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()
    ]


def items(count: int = 12, size: int = 5) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, 8) * (1 + index) for index in range(count)]


def of(values: list[Tensor]) -> ValueSketch:
    sketch = ValueSketch()
    for value in values:
        sketch.update(value)
    return sketch


@pytest.fixture(scope="module")
def net() -> fxopt.CapturedModule:
    return captured(Net(), torch.randn(2, 8))


def test_sketches_are_those_of_the_values_in_eager(net: fxopt.CapturedModule) -> None:
    model, data = Net().eval(), items()
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    found = calibrate(net, floats(net), ((x, "label") for x in data))
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    names = {str(node.target): node.name for node in net.graph.nodes if node.op == "call_function"}
    with torch.no_grad():
        assert found[names["aten.relu.default"]] == of([model.layers[:3](x) for x in data])
        assert found[names["aten.softmax.int"]] == of([model(x) for x in data])
    assert found["x"] == of(data)
    weight = next(node.name for node in net.graph.nodes if node.target == "layers.0.weight")
    assert found[weight].count == len(data) * 16 * 8


def test_extremes_by_channel(net: fxopt.CapturedModule) -> None:
    data = items()
    found = calibrate(net, ["x"], data, channels={"x": 1})["x"]
    assert found.channel_high is not None
    assert found.channel_high.tolist() == torch.cat(data).amax(0).tolist()


def test_order_does_not_matter_even_with_state() -> None:
    gm = captured(Counting(), torch.randn(2, 8))
    data = items()
    name = next(node.name for node in gm.graph.nodes if "mul" in node.name)
    forward, backward = calibrate(gm, [name], data), calibrate(gm, [name], data[::-1])
    assert forward == backward
    assert forward[name] == of(data)
    assert gm.get_buffer("count") == 0


def test_random_numbers_of_a_loader_are_its_own(net: fxopt.CapturedModule) -> None:
    def augmented() -> Iterator[Tensor]:
        for x in items():
            yield x + torch.randn_like(x)

    torch.manual_seed(5)
    want = of(list(augmented()))
    torch.manual_seed(5)
    assert calibrate(net, ["x"], augmented)["x"] == want


def test_graphs_inside() -> None:
    torch.manual_seed(0)
    model = Branching().eval()
    gm = captured(model, torch.randn(2, 8))
    inner = {
        f"{path}/{node.name}": node
        for path, module in gm.named_modules()
        if path and isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    }
    (tanh,) = (name for name in inner if "tanh" in name)
    (cos,) = (name for name in inner if "cos" in name)
    (halved,) = (name for name, node in inner.items() if node.op == "call_function" and "mul" in name)
    data = [x for x in items() if x.sum() > 0]
    assert data
    found = calibrate(gm, [tanh, cos, halved], data)
    assert found[cos].count == 0
    with torch.no_grad():
        want = [model.linear(x).tanh() for x in data]
    assert found[tanh] == of(want)
    turns = []
    for x in want:
        while x.abs().max() > 0.25:
            x = x * 0.5
            turns.append(x)
    assert len(turns) > len(data)
    assert found[halved] == of(turns)
    assert calibrate(gm, [cos], items())[cos].count > 0


# ---- memory


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Take what there is out of ``gc.get_objects()``: millions of objects, in a process of many tests."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_elements() -> int:
    return sum(thing.numel() for thing in gc.get_objects() if type(thing) is Tensor)


@pytest.mark.parametrize("count", [64, 4096])
def test_memory_does_not_grow_with_the_data(net: fxopt.CapturedModule, count: int) -> None:
    sizes: list[int] = []

    def look(done: int, total: int | None) -> None:
        if done in (3, count // 16):
            sizes.append(live_elements())

    def batches() -> Iterator[Tensor]:
        for _ in range(count // 16):
            yield torch.randn(16, 8)

    with old_objects_set_aside():
        calibrate(net, floats(net), batches, progress=look)
        gc.collect()
        assert len(sizes) == 2
        assert 0 < min(sizes) <= max(sizes) <= 4 * 16 * 8  # a batch, and what the loop still holds of it
        assert live_elements() == 0


def test_values_are_dropped_behind_their_last_reader() -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(30):
                x = x * 1.5
            return x

    gm = captured(Deep(), torch.randn(2, 1000))
    alive: list[int] = []

    class Watching(ValueSketch):
        def update(self, tensor: Tensor) -> None:
            alive.append(sum(type(t) is Tensor and t.shape == (7, 1000) for t in gc.get_objects()))
            super().update(tensor)

    with pytest.MonkeyPatch.context() as patch, old_objects_set_aside():
        patch.setattr("fxopt.passes.quantize.calibrate.ValueSketch", Watching)
        calibrate(gm, floats(gm), [torch.randn(7, 1000)])
    assert len(alive) == 31
    assert 1 <= min(alive) <= max(alive) <= 4


# ---- progress and errors


def test_progress(net: fxopt.CapturedModule) -> None:
    calls: list[tuple[int, int | None]] = []
    calibrate(net, ["x"], items(3), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    calls.clear()
    calibrate(net, ["x"], lambda: items(2), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, None), (2, None)]


def test_nan_inside_names_node_and_line() -> None:
    gm = captured(Logarithm(), torch.rand(2, 8))
    name = next(node.name for node in gm.graph.nodes if "log" in node.name)
    bad = torch.rand(3, 8)
    bad[1, 2] = -2.0
    bad[2, 2] = -1.0
    with pytest.raises(CalibrationError) as caught:
        calibrate(gm, [name], [torch.rand(3, 8), bad])
    text = str(caught.value)
    assert text.startswith(f"item 1 of the calibration data: {name} yields 1 NaN and 1 infinite of 24 values")
    assert "test_calibrate.py:" in text
    assert "in forward: return torch.log(y).relu()" in text
    assert "aten.log.default" in text


def test_item_that_does_not_fit(net: fxopt.CapturedModule) -> None:
    with pytest.raises(CalibrationError, match="item 1 of the calibration data: input 'x' does not fit"):
        calibrate(net, ["x"], [torch.randn(2, 8), torch.randn(2, 7)])


def test_unknown_and_unfit_nodes(net: fxopt.CapturedModule) -> None:
    with pytest.raises(ValueError, match=r"the graph has no node 'relo'; close are .*relu"):
        calibrate(net, ["relo"], items())
    with pytest.raises(ValueError, match="channels names y, which is not among the nodes"):
        calibrate(net, ["x"], items(), channels={"y": 1})
    gm = captured(Branching(), torch.randn(2, 8))
    flag = next(n.name for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), Tensor) and v.dtype == torch.bool)
    with pytest.raises(ValueError, match=f"node '{flag}' yields torch.bool, not a tensor of floating type"):
        calibrate(gm, [flag], items())


# ---- checkpoints


class CrashError(Exception):
    pass


def crashing(data: list[Tensor], at: int) -> Callable[[], Iterator[Tensor]]:
    def read() -> Iterator[Tensor]:
        for index, item in enumerate(data):
            if index == at:
                raise CrashError
            yield item

    return read


def interrupted(gm: fxopt.CapturedModule, path: pathlib.Path, data: list[Tensor], at: int = 7) -> None:
    with pytest.raises(CrashError):
        calibrate(gm, floats(gm), crashing(data, at), checkpoint=path, checkpoint_seconds=0)
    assert path.exists()


def test_interrupted_run_goes_on_behind_its_last_item(net: fxopt.CapturedModule, tmp_path: pathlib.Path) -> None:
    path, data = tmp_path / "state.npz", items()
    whole = calibrate(net, floats(net), data)
    interrupted(net, path, data)
    interrupted(net, path, data, at=9)
    ran = 0

    class Counted(ValueSketch):
        def update(self, tensor: Tensor) -> None:
            nonlocal ran
            ran += 1
            super().update(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxopt.passes.quantize.checkpoint.ValueSketch", Counted)
        again = calibrate(net, floats(net), data, checkpoint=path, checkpoint_seconds=0)
    assert ran == 3 * len(again)
    assert again == whole
    assert list(tmp_path.iterdir()) == []


def test_no_file_before_its_time(net: fxopt.CapturedModule, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CrashError):
        calibrate(net, ["x"], crashing(items(), 5), checkpoint=tmp_path / "state.npz", checkpoint_seconds=1e6)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_something_else_is_refused(net: fxopt.CapturedModule, tmp_path: pathlib.Path) -> None:
    path, data, names = tmp_path / "state.npz", items(), floats(net)
    interrupted(net, path, data)
    other = net.clone(copy_tensors=True)
    with torch.no_grad():
        other.get_parameter("layers.0.weight")[0, 0] += 1

    def refused(gm: fxopt.CapturedModule, nodes: list[str], given: Any, **options: Any) -> str:
        with pytest.raises(CalibrationError) as caught:
            calibrate(gm, nodes, given, checkpoint=path, **options)
        assert path.exists()
        return str(caught.value)

    assert "its graph, or a weight of it, is another one" in refused(other, names, data)
    assert f"it has {len(names)} nodes and this calibration 1" in refused(net, ["x"], data)
    assert "other axes of channels" in refused(net, names, data, channels={"x": 1})
    text = refused(net, names, [data[1], data[0], *data[2:]])
    assert "was made from other data, or the same in another order" in text
    assert "got  other values in items 0 to 6" in text
    text = refused(net, names, data[:5])
    assert "was made from more data" in text
    assert re.search(r"got +5 items\n +wanted +at least the 7", text)


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut off"])
def test_damaged_checkpoint_is_refused(net: fxopt.CapturedModule, tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "state.npz"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="is no checkpoint of a calibration, or is damaged"):
        calibrate(net, ["x"], items(), checkpoint=path)


# ---- several processes


def _worker(rank: int, world: int, folder: pathlib.Path) -> None:
    gm = fxopt.load(folder / "net.fxopt")
    data = items()[rank::world]
    found = calibrate(gm, floats(gm), data, checkpoint=f"{folder}/state", checkpoint_seconds=0)
    if rank == 2:
        data[1] = data[1] * torch.nan
    with pytest.raises(CalibrationError) as caught:
        calibrate(gm, floats(gm), data)
    outcome = {name: sketch.to_state() for name, sketch in found.items()}, str(caught.value)
    torch.save(outcome, folder / f"{rank}.pt")


def test_four_processes_give_what_one_gives_and_fail_together(
    net: fxopt.CapturedModule, tmp_path: pathlib.Path
) -> None:
    fxopt.save(net, tmp_path / "net.fxopt")
    run_in_processes(_worker, 4, tmp_path)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(4)]
    alone = calibrate(net, floats(net), items())
    for states, _ in outcomes:
        assert {name: ValueSketch.from_state(state) for name, state in states.items()} == alone
    assert not list(tmp_path.glob("state*"))
    assert "item 1 of the calibration data: input 'x' holds 40 NaN" in outcomes[2][1]
    for rank in (0, 1, 3):
        assert outcomes[rank][1].startswith("calibration failed in process 2")
        assert "CalibrationError: item 1 of the calibration data" in outcomes[rank][1]


def test_group_without_distributed_is_refused(net: fxopt.CapturedModule) -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        calibrate(net, ["x"], items(), group=object())
