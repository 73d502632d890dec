"""The tree is the architecture: which room imports which, what is installed, what is public, how long a file gets."""

import ast
import importlib
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = {"fxopt": "fxopt", "fxopt.passes": "passes", "fxopt.export": "export", "fxopt.tools": "tools"}
MAY_IMPORT = {
    "fxopt": {"fxopt"},
    "fxopt.passes": {"fxopt", "fxopt.passes"},
    "fxopt.export": {"fxopt", "fxopt.export"},
    "fxopt.tools": set(ROOMS),
}
# Inside a function only, so that `import fxopt` does not run it: (file, room) and the reason.
LATE_IMPORTS = {
    ("fxopt/optimize.py", "fxopt.passes"): "optimize(model) with no passes runs fxopt.passes.DEFAULT",
    ("fxopt/view.py", "fxopt.tools"): "fxopt.view is the front door of the pictures that fxopt.tools.viz makes",
}
RUNTIMES = {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}  # the business of export and tools alone
LONGEST_FILE = 400  # lines


def python_files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    """Return the name that a file of a room is imported by."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    room = next(room for room, place in ROOMS.items() if place == folder)
    return ".".join([room, *rest]).removesuffix(".__init__")


def room_of(module: str) -> str:
    """Return the room that a module of fxopt belongs to."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def imports(path: pathlib.Path) -> Iterator[tuple[str, bool]]:
    """Yield (dotted name, whether inside a function) of everything that a file imports, a module's names included."""

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module_name(path).split(".")
                    package = package if path.name == "__init__.py" else package[:-1]
                    package = package[: len(package) - child.level + 1]
                    base = ".".join([*package, *([child.module] if child.module else [])])
                yield from ((f"{base}.{alias.name}", late) for alias in child.names)
            else:
                yield from walk(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(path.read_text()), late=False)


def wrong_imports(path: pathlib.Path) -> list[str]:
    """Return what a file imports against the direction core <- passes, export <- tools."""
    here, wrong = room_of(module_name(path)), []
    for name, late in imports(path):
        if name.split(".")[0] != "fxopt":
            if here in ("fxopt", "fxopt.passes") and name.split(".")[0] in RUNTIMES:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: {here} knows no runtime")
            continue
        there = room_of(name)
        if there not in MAY_IMPORT[here] and not (late and (path.relative_to(ROOT).as_posix(), there) in LATE_IMPORTS):
            wrong.append(f"{path.relative_to(ROOT)} imports {name}: {here} may not import {there}")
    return wrong


def test_imports_point_one_way():
    assert [line for path in python_files(*ROOMS.values()) for line in wrong_imports(path)] == []


@pytest.mark.parametrize(
    ("file", "code", "wrong"),
    [
        ("fxopt/args.py", "import fxopt.passes.cleanup", True),
        ("fxopt/args.py", "from fxopt import export", True),
        ("fxopt/args.py", "from .tools import cli", True),
        ("fxopt/args.py", "def f():\n    from fxopt.passes import DEFAULT", True),
        ("fxopt/args.py", "import onnxruntime as ort", True),
        ("fxopt/args.py", "from fxopt.errors import FxoptError", False),
        ("fxopt/args.py", "from . import errors", False),
        ("fxopt/optimize.py", "def f():\n    from fxopt.passes import DEFAULT", False),
        ("fxopt/optimize.py", "from fxopt.passes import DEFAULT", True),
        ("passes/cleanup/fold.py", "from fxopt.export import to_onnx", True),
        ("passes/cleanup/fold.py", "from ...export import to_onnx", True),
        ("passes/cleanup/fold.py", "from ..registry import DEFAULT", False),
        ("passes/cleanup/fold.py", "import fxopt", False),
        ("export/to_onnx.py", "from fxopt import passes", True),
        ("export/to_onnx.py", "import onnx", False),
        ("tools/cli.py", "from fxopt import export, passes", False),
    ],
)
def test_import_rule_has_teeth(file, code, wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert bool(wrong_imports(path)) is wrong


def code_folders() -> set[str]:
    """Return the package name of every folder that holds code, below any room."""
    return {module_name(path.parent / "__init__.py") for path in python_files(*ROOMS.values())}


def test_every_folder_with_code_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    missing = code_folders() - set(setuptools["packages"])
    assert not missing, f"add to [tool.setuptools] packages in pyproject.toml: {sorted(missing)}"
    gone = set(setuptools["packages"]) - code_folders()
    assert not gone, f"take out of [tool.setuptools] packages in pyproject.toml: {sorted(gone)}"
    assert setuptools["package-dir"] == ROOMS


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["demo"]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines} | {"fxopt"}
    declared = {{"scikit_learn": "sklearn"}.get(name, name) for name in declared}
    used = {name.split(".")[0] for path in python_files(*ROOMS.values()) for name, _ in imports(path)}
    assert used - declared - sys.stdlib_module_names == set()


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in python_files(*ROOMS.values())}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert (ROOT / "fxopt" / "py.typed").exists()


def test_no_file_is_called_utils():
    names = {"utils", "util", "helpers", "misc", "common"}
    assert [str(path) for path in python_files(*ROOMS.values(), "tests") if path.stem in names] == []


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in python_files(*ROOMS.values(), "tests")}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > LONGEST_FILE} == {}


def bound_names(tree: ast.Module, package: str) -> set[str]:
    """Return the public names that a package's ``__init__`` binds, less what it imports for its own use."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.level or f"{node.module}.".startswith(f"{package}.")):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("package", ROOMS)
def test_public_names_are_listed(package):
    path = ROOT / ROOMS[package] / "__init__.py"
    if not path.exists():
        pytest.skip(f"{package} is not written yet")
    module = importlib.import_module(package)
    listed = module.__all__
    assert len(listed) == len(set(listed))
    assert [name for name in listed if not hasattr(module, name)] == []
    rooms_inside = {room.removeprefix(f"{package}.") for room in ROOMS if room.startswith(f"{package}.")}
    public = {name for name in listed if not name.startswith("_")} - rooms_inside
    assert public == bound_names(ast.parse(path.read_text()), package) - rooms_inside
