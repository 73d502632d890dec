"""Random programs: captured, they equal eager bit for bit, and their exports take the same ways."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fxopt
from tests.core.control_flow.random_programs import random_program

QUICK, LONG = range(18), range(18, 400)


def loaded(text: str, path: Path) -> ModuleType:
    """Return the module of a program, which needs a file: capture reads the text of what it rewrites."""
    path.write_text(f"import torch\n\n\n{text}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(seed: int, count: int = 30) -> list[torch.Tensor]:
    """Return vectors: three variables, and how often a loop turns."""
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.randint(0, 4, (1,), generator=generator).float() for _ in range(count)]
    return [torch.cat([torch.randn(3, generator=generator) * 1.5, turn]) for turn in turns]


def check(seed: int, folder: Path) -> fxopt.CapturedModule:
    text = random_program(seed)
    function = loaded(text, folder / f"program_{seed}.py").forward
    try:
        gm = fxopt.capture(function, (inputs(seed)[0],))
    except fxopt.CaptureError as refused:
        if "shares its memory with another one that the loop uses" not in str(refused):
            raise
        pytest.skip("its loop writes into a view of what it reads, which is refused")
    for x in inputs(seed):
        assert all(torch.equal(a, b) for a, b in zip(function(x), gm(x), strict=True)), f"{x}\n{text}"
    return gm


@pytest.mark.parametrize("seed", QUICK)
def test_random_program_equals_eager(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.ort
@pytest.mark.parametrize("seed", LONG)
def test_random_program_equals_eager_and_onnx_runtime(seed: int, tmp_path: Path) -> None:
    from fxopt.export import to_onnx

    to_onnx(check(seed, tmp_path))  # validates, and raises if an output differs


def test_random_programs_use_every_construct() -> None:
    texts = "\n".join(random_program(seed) for seed in QUICK)
    for construct in (
        "elif",
        "else:",
        "while",
        "range(int",
        "range(3)",
        "break",
        "continue",
        "return",
        " and ",
        "not ",
    ):
        assert texts.count(construct) > 2, construct


PASSES = {
    "simplify": "remove-identities,simplify-branches",
    "select": "branches-to-select,remove-dead-code",
    "dispatch": "dispatch,simplify-branches",
    "specialize": "specialize-branches{samples=true},simplify-branches",
}


def check_passes(seed: int, passes: str, folder: Path) -> None:
    gm = check(seed, folder).eval()
    new = fxopt.optimize(gm, passes=passes, strict=True)
    for x in inputs(seed):
        try:
            got = new(x)
        except fxopt.GuardError:
            continue
        assert all(torch.equal(a, b) for a, b in zip(gm(x), got, strict=True)), f"{x}\n{random_program(seed)}"


@pytest.mark.parametrize("seed", [2, 75])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_passes_keep_every_way_of_random_programs(passes: str, seed: int, tmp_path: Path) -> None:
    check_passes(seed, passes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2000, 2100))
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_passes_keep_every_way_of_many_random_programs(passes: str, seed: int, tmp_path: Path) -> None:
    check_passes(seed, passes, tmp_path)
