"""Example inputs as text: ``"f32[batch,3,224,224]"``, ``"ids=i64[batch,seq<512]{0..30521}; mask=bool[batch,seq]"``.

    inputs    = input { (";" | "," | blank) input }
    input     = [name "="] value                          a name makes it a keyword argument
    value     = tensor | number | true | false | none | file | "(" value { "," value } ")"
    tensor    = dtype "[" [size { "," size }] "]" [ "{" low ".." high "}" ]
    dtype     = f16 bf16 f32 f64  i8 i16 i32 i64  u8  bool  c64 c128, or torch's name, such as float32
    size      = integer | dimension ["=" integer]         the integer is the size of the example
    dimension = name, name<64, 2<=name<=64                a size that stays dynamic
    file      = path of a .npy, .npz, .pt or .pth file

The numbers in the tensors are random, and the same for the same text and seed. A range includes both ends. Without one,
floats follow the normal distribution, bytes are 0..255, and integers and bools are 0 or 1 with a 1 at the front of each
row: legal as token numbers, as token types, and as masks that hide no whole row.

A dimension at axis 0 has 2 elements in the example, any other one 16, or the nearest size that its bounds allow.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from fxopt.dimensions import Sample, bind_arguments, parse_dimension
from fxopt.errors import describe
from fxopt.input_files import FILE_SUFFIXES, read_inputs

__all__ = ["ExampleInputs", "parse_axes", "parse_inputs"]

_DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8,
    "bool": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
_TORCH_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
_WORDS = {"true": True, "false": False, "none": None}
_NAME = re.compile(r"([A-Za-z_]\w*)\s*=\s*")
_TENSOR = re.compile(r"([A-Za-z]\w*)\s*\[")
_WORD = re.compile(r"[^\s;,()]+")
_EXAMPLE_SIZE = re.compile(r"^(?P<dimension>.*?)(?<![<>=])=\s*(?P<size>\d+)\s*$")
_RANGE = re.compile(r"\{\s*(?P<low>[^\s{}]+?)\s*\.\.\s*(?P<high>[^\s{}]+?)\s*\}")
_LEADING, _OTHER = 2, 16  # example sizes of a dimension at axis 0, and elsewhere
_EXAMPLE = "f32[batch,3,224,224] or ids=i64[batch,seq<512]"


@dataclasses.dataclass(frozen=True)
class ExampleInputs:
    """What an input spec stands for.

    Attributes:
        samples: The example inputs; more than one only if a ``.pt`` file holds a list.
        axes: In the place of each tensor its dynamic sizes, ``{axis: Dim}``, or None.
    """

    samples: tuple[Sample, ...]
    axes: Sample

    def dynamic_shapes(self, forward: Callable[..., Any]) -> dict[str, Any] | None:
        """Return the dynamic sizes by name of forward's parameters, as :func:`fxopt.capture` takes them, or None.

        Raises:
            CaptureError: the inputs do not fit the signature.
        """
        if not any(isinstance(leaf, torch.export.Dim) for leaf in self.axes.leaves()):
            return None
        return bind_arguments(forward, self.axes)


def parse_inputs(text: str, *, seed: int = 0) -> ExampleInputs:
    """Return the example inputs that ``text`` describes; the syntax stands at the top of this module.

    Args:
        text: The spec, or the path of one file with all inputs: arrays named ``arr_0``, ... of an ``.npz`` are
            positional arguments, others keyword arguments; a ``.pt`` holds a tensor, a tuple, a dict or samples.
        seed: Of the random numbers.

    Raises:
        ValueError: the text is no spec, or a file cannot be read; the message points at the place.
    """
    whole = text.strip()
    if whole.lower().endswith(FILE_SUFFIXES) and (Path(whole).exists() or not re.search(r"[\s;,=(]", whole)):
        samples = read_inputs(whole)
        return ExampleInputs(samples, samples[0].map(lambda leaf: None))
    return _Reader(text, seed).inputs()


def parse_axes(text: str, inputs: ExampleInputs) -> ExampleInputs:
    """Return ``inputs`` with more dynamic sizes: ``"x:0=batch; ids:1=2<=seq<512"``, positional inputs by number.

    Raises:
        ValueError: the text has another form, or names an input or an axis that there is not.
    """
    args, kwargs = list(inputs.axes.args), dict(inputs.axes.kwargs)
    sample = inputs.samples[0]
    known: dict[str, Any] = {}
    for part in re.split(r"[;,\s]+", text.strip()):
        found = re.fullmatch(r"(\w+):(\d+)=(.+)", part)
        if not found:
            raise ValueError(
                describe(
                    f"{part!r} names no dynamic axis", wanted="input:axis=dimension, such as 0:0=batch or ids:1=seq<512"
                )
            )
        key, axis = found[1], int(found[2])
        names = [*map(str, range(len(args))), *kwargs]
        if key not in names:
            raise ValueError(
                describe(f"there is no input {key!r} to give a dynamic axis", wanted=f"one of {', '.join(names)}")
            )
        tensor = sample.args[int(key)] if key.isdigit() else sample.kwargs[key]
        if not isinstance(tensor, torch.Tensor) or axis >= tensor.ndim:
            got = f"shape {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(describe(f"input {key!r} has no axis {axis}", got=got))
        dim = parse_dimension(found[3])
        dim = known.setdefault(dim.__name__, dim)
        table: Any = args if key.isdigit() else kwargs
        place: Any = int(key) if key.isdigit() else key
        table[place] = (table[place] or {}) | {axis: dim}
    return ExampleInputs(inputs.samples, Sample(tuple(args), kwargs))


@dataclasses.dataclass
class _Size:
    """A dimension with a name, as far as the text has told."""

    dim: Any
    where: int
    bounded: bool
    example: int | None = None
    leading: bool = False

    @property
    def size(self) -> int:
        """Size in the example."""
        low, high = self.dim.min, self.dim.max
        wanted = self.example if self.example is not None else _LEADING if self.leading else _OTHER
        return int(max(low, wanted) if high is None or wanted <= high else high)


@dataclasses.dataclass
class _Tensor:
    """A tensor of the spec: element type, sizes (names for dynamic ones) and range."""

    dtype: torch.dtype
    sizes: list[int | str]
    span: tuple[float, float] | None


class _Reader:
    """Reads a spec from left to right."""

    def __init__(self, text: str, seed: int) -> None:
        self.text, self.at = text, 0
        self.random = torch.Generator().manual_seed(seed)
        self.dims: dict[str, _Size] = {}

    def fail(self, what: str, wanted: str | None = None, try_: str | None = None, *, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        line = self.text.replace("\n", " ").replace("\t", " ")
        raise ValueError(describe(what, at=f"{line}\n{' ' * at}^", wanted=wanted, try_=try_))

    def blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def inputs(self) -> ExampleInputs:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        self.blanks()
        if self.at == len(self.text):
            raise ValueError(describe("the input spec is empty", wanted=f"for example {_EXAMPLE}"))
        while self.at < len(self.text):
            start = self.at
            name = _NAME.match(self.text, self.at)
            self.at = name.end() if name else self.at
            value = self.value()
            if name is None and kwargs:
                self.fail(
                    "an input without a name stands behind one with a name",
                    "names for all inputs from the first named one on",
                    at=start,
                )
            if name is not None and name[1] in kwargs:
                self.fail(f"two inputs are called {name[1]!r}", at=start)
            if name is None:
                args.append(value)
            else:
                kwargs[name[1]] = value
            self.separator()
        sizes = {name: found.size for name, found in self.dims.items()}
        spec = Sample(tuple(args), kwargs)
        return ExampleInputs(
            (spec.map(lambda leaf: self.example(leaf, sizes)),),
            spec.map(self.axes),
        )

    def separator(self) -> None:
        before = self.at
        self.blanks()
        if self.next() in (";", ","):
            self.at += 1
            self.blanks()
        elif self.at == before and self.at < len(self.text):
            self.fail(f"{self.next()!r} stands where the next input would begin", "';' or a blank between two inputs")

    def value(self) -> Any:
        if self.next() == "(":
            return self.group()
        tensor = _TENSOR.match(self.text, self.at)
        if tensor:
            return self.tensor(tensor)
        word = _WORD.match(self.text, self.at)
        if not word:
            self.fail("an input is missing here", f"for example {_EXAMPLE}")
        text = word[0]
        if text.lower() in _WORDS:
            self.at = word.end()
            return _WORDS[text.lower()]
        for number in (int, float):
            try:
                value = number(text)
            except ValueError:
                continue
            self.at = word.end()
            return value
        if text.lower().endswith(FILE_SUFFIXES):
            return self.file(word)
        if text in _DTYPES or text in _TORCH_NAMES:
            self.fail(
                f"the sizes of {text!r} are missing",
                f"{text}[] for a single number, {text}[batch,3] for a matrix",
                at=word.end(),
            )
        return self.fail(
            f"{text!r} is not an input", f"for example {_EXAMPLE}; a number; or a file {', '.join(FILE_SUFFIXES)}"
        )

    def group(self) -> tuple[Any, ...]:
        start, items = self.at, []
        self.at += 1
        self.blanks()
        while self.next() != ")":
            if self.at == len(self.text):
                self.fail("this '(' is never closed", at=start)
            items.append(self.value())
            if self.next() != ")":
                self.separator()
        self.at += 1
        return tuple(items)

    def file(self, word: re.Match[str]) -> Any:
        try:
            samples = read_inputs(word[0])
        except ValueError as error:
            self.fail(str(error))
        sample = samples[0]
        if len(samples) != 1 or sample.kwargs or len(sample.args) != 1:
            count = len(sample.args) + len(sample.kwargs)
            self.fail(
                f"{word[0]} holds {len(samples)} sample(s) of {count} input(s), not one input",
                "this file alone as the whole spec",
            )
        self.at = word.end()
        return sample.args[0]

    def tensor(self, found: re.Match[str]) -> _Tensor:
        dtype = _DTYPES.get(found[1]) or _TORCH_NAMES.get(found[1])
        if dtype is None:
            close = difflib.get_close_matches(found[1], [*_DTYPES, *_TORCH_NAMES], n=1)
            self.fail(
                f"{found[1]!r} is not an element type", f"one of {', '.join(_DTYPES)}", close[0] if close else None
            )
        end = self.text.find("]", found.end())
        if end < 0:
            self.fail("this '[' is never closed", at=found.end() - 1)
        sizes: list[int | str] = []
        self.at = found.end()
        if self.text[self.at : end].strip():
            for axis, part in enumerate(self.text[self.at : end].split(",")):
                self.blanks()
                sizes.append(self.size(part.strip(), axis))
                self.at += len(part.lstrip()) + 1
        self.at = end + 1
        return _Tensor(dtype, sizes, self.span(dtype))

    def size(self, text: str, axis: int) -> int | str:
        if text.isdigit():
            if int(text) == 0:
                self.fail(
                    "a tensor of size 0 holds nothing to check with",
                    "an example of size 1 or more; a dimension still allows 0 later",
                )
            return int(text)
        given = _EXAMPLE_SIZE.match(text)
        example = int(given["size"]) if given else None
        try:
            dim = parse_dimension(given["dimension"] if given else text)
        except ValueError:
            self.fail(
                f"{text!r} is not a size",
                "an integer, or a name with optional bounds and example size: batch, batch=4, 2<=seq<512",
            )
        name, bounded = (
            str(dim.__name__),
            (dim.min, dim.max) != (parse_dimension("any").min, parse_dimension("any").max),
        )
        if dim.max is not None and dim.max < 2:
            self.fail(
                f"dimension {name!r} has room for no size but {dim.max}",
                "a bound of 2 or more, or a plain integer instead of a name",
            )
        known = self.dims.setdefault(name, _Size(dim, self.at, bounded, example, leading=axis == 0))
        if bounded and known.bounded and (known.dim.min, known.dim.max) != (dim.min, dim.max):
            self.fail(
                f"dimension {name!r} is given two different ranges",
                "one range; where it is named again, the name is enough",
            )
        if bounded and not known.bounded:
            known.dim, known.bounded = dim, True
        if example is not None and known.example not in (None, example):
            self.fail(f"dimension {name!r} is given two example sizes, {known.example} and {example}", "one of them")
        known.example = known.example if example is None else example
        known.leading |= axis == 0
        low, high = known.dim.min, known.dim.max
        if known.example is not None and (known.example < max(low, 1) or (high is not None and known.example > high)):
            self.fail(
                f"example size {known.example} of {name!r} lies outside its bounds",
                f"a size from {max(low, 1)} to {high or 'any'}",
            )
        return name

    def span(self, dtype: torch.dtype) -> tuple[float, float] | None:
        if self.next() != "{":
            return None
        start = self.at
        found = _RANGE.match(self.text, self.at)
        if not found:
            self.fail("this is not a range of values", "{low..high}, both included, such as {0..30521}")
        if dtype == torch.bool or dtype.is_complex:
            self.fail(f"{str(dtype).removeprefix('torch.')} takes no range of values")
        number = float if dtype.is_floating_point else int
        try:
            low, high = number(found["low"]), number(found["high"])
        except ValueError:
            self.fail(f"{found[0]} is not a range of {'numbers' if dtype.is_floating_point else 'integers'}", at=start)
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        if not (math.isfinite(low) and math.isfinite(high)) or low < limits.min or high > limits.max:
            self.fail(
                f"{found[0]} does not fit {str(dtype).removeprefix('torch.')}",
                f"numbers from {limits.min:g} to {limits.max:g}",
            )
        if low > high:
            self.fail(f"{found[0]} holds no value: {low:g} > {high:g}")
        self.at = found.end()
        return low, high

    def axes(self, leaf: Any) -> Any:
        if not isinstance(leaf, _Tensor):
            return None
        return {axis: self.dims[size].dim for axis, size in enumerate(leaf.sizes) if isinstance(size, str)} or None

    def example(self, leaf: Any, sizes: dict[str, int]) -> Any:
        if not isinstance(leaf, _Tensor):
            return leaf
        shape = [sizes[size] if isinstance(size, str) else size for size in leaf.sizes]
        return random_tensor(shape, leaf.dtype, leaf.span, self.random)


def random_tensor(
    shape: list[int], dtype: torch.dtype, span: tuple[float, float] | None, random: torch.Generator
) -> torch.Tensor:
    """Return a random tensor; see the top of this module for what is drawn where ``span`` is None."""
    if dtype.is_floating_point or dtype.is_complex:
        if span is None:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            return torch.randn(shape, generator=random, dtype=wide).to(dtype)
        low, high = span
        drawn = low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)
        return drawn.clamp(low, high).to(dtype)
    if span is None and dtype == torch.uint8:
        span = (0, 255)
    if span is None:
        drawn = torch.rand(shape, generator=random) < 0.75
        if shape:
            drawn[..., 0] = True
        return drawn.to(dtype)
    low, high = int(span[0]), int(span[1])
    return torch.randint(
        low, min(high + 1, torch.iinfo(torch.int64).max), shape, generator=random, dtype=torch.int64
    ).to(dtype)
