"""The pass and the test of CONTRIBUTING.md run as they are printed, and the test notices a wrong pass."""

import inspect
import pathlib
import re
import sys
import tomllib
import types

import pytest

from fxopt.passes import PASSES

PAGE = (pathlib.Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
PASS_CODE, TEST_CODE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MODULE = "fxopt.passes.fold_relu_after_clamp"


def run_page(monkeypatch, pass_code):
    """Run the page's test against ``pass_code`` and return the names of the test functions that ran."""
    module = types.ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    exec(compile(pass_code, f"{MODULE}.py", "exec"), module.__dict__)
    tests = types.ModuleType("test_fold_relu_after_clamp")
    monkeypatch.setitem(sys.modules, tests.__name__, tests)
    exec(compile(TEST_CODE, f"{tests.__name__}.py", "exec"), tests.__dict__)
    found = [item for name, item in vars(tests).items() if name.startswith("test_") and inspect.isfunction(item)]
    for test in found:
        test()
    return [test.__name__ for test in found]


def test_the_example_passes_its_own_tests(monkeypatch):
    assert len(run_page(monkeypatch, PASS_CODE)) == 4


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("else max(high, 0)", "else high"),
        ("else max(low, 0)", "else low"),
        ("len(clamp.users) > 1", "len(clamp.users) > 9"),
        ("and bound == bound", ""),
        ("(was := rw.dtype(x)) != (now := rw.dtype(clamp))", "(was := 0) != (now := 0)"),
    ],
)
def test_the_example_test_has_teeth(monkeypatch, right, wrong):
    assert PASS_CODE.count(right) == 1
    with pytest.raises(Exception, match=r"\S"):  # a failed assertion, or the pass's own error
        run_page(monkeypatch, PASS_CODE.replace(right, wrong))


def test_the_example_is_not_one_of_the_built_in_passes(monkeypatch):
    module = types.ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    exec(PASS_CODE, module.__dict__)
    assert module.FoldReluAfterClamp.name not in {item.name for item in PASSES}


def test_entry_point_registers_the_example():
    (block,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    entries = tomllib.loads(block)["project"]["entry-points"]["fxopt.passes"]
    assert entries == {"fold-relu-after-clamp": "my_package.fold_relu_after_clamp:FoldReluAfterClamp"}


def test_every_make_target_on_the_page_exists():
    makefile = (pathlib.Path(__file__).parent.parent / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"^    make (\w+)", PAGE, re.MULTILINE)) <= targets
