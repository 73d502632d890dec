"""Example inputs as text and from files: what is read, what is drawn, and where an error points."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt import CaptureError
from fxopt.input_spec import parse_axes, parse_inputs

DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64, "i8": torch.int8,
    "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8, "bool": torch.bool,
    "c64": torch.complex64, "c128": torch.complex128, "float32": torch.float32, "int64": torch.int64,
}  # fmt: skip


def one(text: str):
    """Return the only argument of the only sample."""
    (sample,) = parse_inputs(text).samples
    (value,) = sample.args
    assert not sample.kwargs
    return value


@pytest.mark.parametrize("name", DTYPES)
def test_element_types(name):
    value = one(f"{name}[2, 3]")
    assert (value.dtype, value.shape) == (DTYPES[name], (2, 3))


@given(st.lists(st.integers(1, 5), max_size=4), st.sampled_from(sorted(DTYPES)))
def test_fixed_sizes_are_taken_as_written(sizes, dtype):
    value = one(f"{dtype}[{','.join(map(str, sizes))}]")
    assert list(value.shape) == sizes
    assert value.dtype == DTYPES[dtype]


@given(st.integers(-128, 127), st.integers(-128, 127))
def test_values_stay_in_their_range_and_reach_both_ends(a, b):
    low, high = sorted((a, b))
    high = min(high, low + 3)
    value = one(f"i8[400]{{{low}..{high}}}")
    assert set(value.tolist()) == set(range(low, high + 1))


def test_range_of_floats():
    value = one("f32[1000]{-0.5..0.25}")
    assert value.min() >= -0.5
    assert value.max() <= 0.25
    assert value.max() - value.min() > 0.7


def test_integers_without_a_range_are_legal_tokens_and_masks():
    value = one("i64[50,7]")
    assert set(value.flatten().tolist()) == {0, 1}
    assert value[:, 0].tolist() == [1] * 50
    assert one("bool[50,7]")[:, 0].all()


def test_same_text_and_seed_draw_the_same():
    first, second, other = (parse_inputs("f32[4,4]", seed=seed).samples[0].args[0] for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_drawing_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    parse_inputs("f32[4,4]; i64[3]")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("f32[batch,seq]", (2, 16)),
        ("f32[batch=5,seq=3]", (5, 3)),
        ("f32[batch,seq<8]", (2, 7)),
        ("f32[batch,20<=seq]", (2, 20)),
        ("f32[4<batch<=9,3]", (5, 3)),
        ("f32[3,2<=n<64=6]", (3, 6)),
    ],
)
def test_size_of_the_example(text, shape):
    assert one(text).shape == shape


def test_one_name_is_one_size_wherever_it_stands():
    (sample,) = parse_inputs("ids=i64[batch,seq<512]{0..99}; mask=bool[batch,seq]; turned=f32[seq,batch]").samples
    assert list(sample.kwargs) == ["ids", "mask", "turned"]
    shapes = [tuple(value.shape) for value in sample.kwargs.values()]
    assert shapes[0] == shapes[1] == shapes[2][::-1]


def test_numbers_words_and_groups():
    (sample,) = parse_inputs("f32[2], 3 2.5 true None; (f32[1], (i64[2], 4)) last=false").samples
    assert sample.args[1:5] == (3, 2.5, True, None)
    assert type(sample.args[1]) is int
    nested = sample.args[5]
    assert (nested[0].shape, nested[1][0].shape, nested[1][1]) == ((1,), (2,), 4)
    assert sample.kwargs == {"last": False}


def test_dynamic_sizes_go_to_the_parameters():
    found = parse_inputs("f32[batch,3]; other=i64[batch,2<=seq<9]").dynamic_shapes(lambda image, other: None)
    assert {axis: dim.__name__ for axis, dim in found["image"].items()} == {0: "batch"}
    seq = found["other"][1]
    assert (seq.__name__, seq.min, seq.max) == ("seq", 2, 8)
    assert found["other"][0] is found["image"][0]


def test_fixed_sizes_alone_are_not_dynamic():
    assert parse_inputs("f32[2,3]").dynamic_shapes(lambda x: None) is None


def test_inputs_that_do_not_fit_the_parameters():
    with pytest.raises(CaptureError, match="too many positional arguments"):
        parse_inputs("f32[n]; f32[n]").dynamic_shapes(lambda x: None)


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("f32[2]; f33[2]", "'f33' is not an element type", 8),
        ("f32[2,x y]", "'x y' is not a size", 6),
        ("f32[2,0]", "a tensor of size 0", 6),
        ("f32[2", "this '[' is never closed", 3),
        ("(f32[2]", "this '(' is never closed", 0),
        ("f32", "the sizes of 'f32' are missing", 3),
        ("f32[2]f32[2]", "'f' stands where the next input would begin", 6),
        ("f32[2];;", "an input is missing here", 7),
        ("a=f32[2]; f32[2]", "stands behind one with a name", 10),
        ("a=f32[2]; a=f32[2]", "two inputs are called 'a'", 10),
        ("f32[n<8]; f32[n<9]", "two different ranges", 14),
        ("f32[n=3]; f32[n=4]", "two example sizes, 3 and 4", 14),
        ("f32[n<8=9]", "lies outside its bounds", 4),
        ("f32[n<2]", "has room for no size but 1", 4),
        ("u8[2]{0..256}", "does not fit uint8", 5),
        ("i64[2]{0..1.5}", "is not a range of integers", 6),
        ("i64[2]{5..4}", "holds no value", 6),
        ("bool[2]{0..1}", "bool takes no range", 7),
        ("f32[2]{1}", "this is not a range of values", 6),
        ("elephant", "'elephant' is not an input", 0),
        ("missing.npy f32[2]", "there is no file missing.npy", 0),
    ],
)
def test_error_points_at_the_place(text, message, column):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_inputs(text)
    lines = str(caught.value).splitlines()
    shown = next(index for index, line in enumerate(lines) if line.startswith("  at "))
    assert lines[shown + 1].index("^") - lines[shown].index(text) == column


@given(st.text(alphabet="f32i64bo[]{}(),;=<.. 0n_", max_size=24))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_inputs(text)
    except ValueError:
        return
    assert found.samples[0].leaves()


# -- files -----------------------------------------------------------------------------------------------------------


def test_npy_is_one_argument_and_npz_many(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    assert torch.equal(one(str(tmp_path / "x.npy")), torch.arange(6.0, dtype=torch.float64).reshape(2, 3))
    np.savez(tmp_path / "two.npz", *[np.full(1, number) for number in range(12)])
    (sample,) = parse_inputs(str(tmp_path / "two.npz")).samples
    assert [int(value) for value in sample.args] == list(range(12))
    np.savez(tmp_path / "named.npz", ids=np.ones(2), mask=np.zeros(2, bool))
    (sample,) = parse_inputs(str(tmp_path / "named.npz")).samples
    assert set(sample.kwargs) == {"ids", "mask"}
    assert sample.kwargs["mask"].dtype == torch.bool


def test_pt_holds_a_tensor_a_tuple_a_dict_or_samples(tmp_path):
    path, x = tmp_path / "x.pt", torch.arange(3)
    torch.save((x, 2), path)
    assert parse_inputs(str(path)).samples[0].args[1] == 2
    torch.save({"x": x}, path)
    assert torch.equal(parse_inputs(str(path)).samples[0].kwargs["x"], x)
    torch.save([x, x[:2]], path)
    assert [len(sample.args[0]) for sample in parse_inputs(str(path)).samples] == [3, 2]
    torch.save([], path)
    with pytest.raises(ValueError, match="empty list"):
        parse_inputs(str(path))


def test_file_stands_beside_other_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones(3, np.float32))
    (sample,) = parse_inputs("f32[2]; weight=x.npy").samples
    assert sample.kwargs["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt"])
def test_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=rf"x\.{suffix} is not a file of .*damaged"):
        parse_inputs(str(path))


def test_file_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save(Trap(), tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    for path in ("x.pt", "x.npy"):
        with pytest.raises(ValueError, match="is not a file of"):
            parse_inputs(str(tmp_path / path))
    assert not (tmp_path / "trapped").exists()


def test_type_that_torch_lacks_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", words=np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"array 'words' has element type <U1"):
        parse_inputs(str(tmp_path / "x.npz"))


# -- axes by number --------------------------------------------------------------------------------------------------


def test_axes_by_number_and_by_name():
    inputs = parse_axes("0:0=batch; ids:1=2<=seq<9, ids:0=batch", parse_inputs("f32[2,3]; ids=i64[2,4]"))
    found = inputs.dynamic_shapes(lambda x, ids: None)
    assert found["x"][0] is found["ids"][0]
    assert (found["ids"][1].min, found["ids"][1].max) == (2, 8)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("batch", "'batch' names no dynamic axis"),
        ("1:0=n", "there is no input '1'"),
        ("0:2=n", "input '0' has no axis 2"),
        ("0:0=2<", "dimension '2<' is not a name"),
    ],
)
def test_wrong_axes(axes, message):
    with pytest.raises(ValueError, match=message):
        parse_axes(axes, parse_inputs("f32[2,3]"))
