"""Find the model that a text names: ``net.py:Net``, ``package.module:make``, ``net.pt2``, ``net.fxopt``."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fxopt
from fxopt.errors import describe
from fxopt.tools.console import BadInputError, as_bad_input

__all__ = ["explained", "load_function", "load_model"]

_FORMS = "net.py:Net, package.module:make, a .pt2 of torch.export, or a graph that fxopt saved"
_FUNCTION = "net.py:score or package.module:score"
_SAVED = (".pt2", ".fxopt")


def load_model(text: str) -> Any:
    """Return the module, exported program, captured graph or function that ``text`` names.

    A class is called without arguments, and so is a function that needs none: a factory. A function that needs
    arguments is a model itself, a function of tensors. The random state is fixed before, so that weights drawn at
    random are the same each time.

    Raises:
        BadInputError: there is no such model, or making it raises.
    """
    place, colon, name = text.rpartition(":")
    if not colon or (Path(text).exists() and not place.endswith(".py")):
        return _from_file(text)
    if not place or not name:
        raise BadInputError(describe(f"{text!r} names no model", wanted=_FORMS))
    module = _module(place)
    found = _look_up(module, name, text)
    torch.manual_seed(0)
    return _made(found, text)


def load_function(text: str) -> Callable[..., Any]:
    """Return the function that ``text`` names as a model is named.

    Raises:
        BadInputError: there is no such function.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise BadInputError(describe(f"{text!r} names no function", wanted=_FUNCTION))
    found = _look_up(_module(place, _FUNCTION), name, text)
    if not callable(found):
        raise BadInputError(describe(f"{text} is not a function, but a value of type {type(found).__name__}"))
    return found  # type: ignore[no-any-return]  # callable, as was just seen


def _from_file(text: str) -> Any:
    path = Path(text)
    if path.is_dir():
        raise BadInputError(describe(f"{text} is a folder", wanted=_FORMS))
    if not path.exists():
        looks_like_file = path.suffix in (".py", *_SAVED) or "/" in text
        raise BadInputError(
            describe(f"there is no file {text}" if looks_like_file else f"{text!r} names no model", wanted=_FORMS)
        )
    if path.suffix == ".py":
        names = ", ".join(f"{text}:{name}" for name in _names_in(path)) or None
        raise BadInputError(
            describe(
                f"{text} does not say which model", wanted=f"{text}:Name, a class or function of the file", try_=names
            )
        )
    if path.suffix == ".onnx":
        raise BadInputError(describe(f"{text} is an ONNX file already, and not a torch model", wanted=_FORMS))
    if _is_exported_program(path):
        try:
            return torch.export.load(path)
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            raise BadInputError(
                f"{text} cannot be loaded by torch.export: {type(error).__name__}: {first[:200]}"
            ) from error
    if path.suffix == ".pt2" and not zipfile.is_zipfile(path):
        raise BadInputError(f"{text} is no .pt2 of torch.export, or is damaged")
    with as_bad_input():
        return fxopt.load(path)


def _is_exported_program(path: Path) -> bool:
    """Tell a .pt2 of torch.export from a saved graph: both are zip archives, and only one names its format."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json")
                for name in archive.namelist()
            )
    except (zipfile.BadZipFile, OSError):
        return False


def _module(place: str, wanted: str = _FORMS) -> ModuleType:
    is_file = place.endswith(".py")
    path = Path(place)
    if is_file and not path.is_file():
        raise BadInputError(describe(f"there is no file {place}", wanted=wanted))
    if not is_file and ("/" in place or (path.exists() and path.is_file())):
        raise BadInputError(
            describe(f"{place} is not a Python file, so that nothing in it can be named", wanted=wanted)
        )
    folder = str(path.resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # what lies beside the file can be imported, as `python net.py` allows
    try:
        return _run_file(path) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not is_file and place.startswith(str(error.name)):
            raise BadInputError(
                describe(
                    f"there is no module {error.name!r}", wanted=wanted, searched=f"{folder} and the installed packages"
                )
            ) from error
        raise BadInputError(explained(f"importing {place} fails", error, place)) from error


def _run_file(path: Path) -> ModuleType:
    # A file called like a module that somebody imports, say random.py, must not take its place.
    name = path.stem if path.stem not in {*sys.modules, *sys.stdlib_module_names} else f"model_in_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_up(module: ModuleType, name: str, text: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            there = list(_public(found))
            close = difflib.get_close_matches(part, there, n=1)
            place = text.rpartition(":")[0]
            raise BadInputError(
                describe(
                    f"{place} has no {name!r}",
                    there_is=", ".join(there) or "nothing that can be called",
                    try_=f"{place}:{close[0]}" if close else None,
                )
            )
        found = getattr(found, part)
    return found


def _public(owner: Any) -> Iterator[str]:
    """Yield the names of what could be a model: what the module itself defines, not what it imports."""
    for name, item in vars(owner).items():
        own = isinstance(item, torch.nn.Module) or getattr(item, "__module__", None) == getattr(owner, "__name__", None)
        if not name.startswith("_") and callable(item) and own:
            yield name


def _names_in(path: Path) -> list[str]:
    """Return the names of classes and functions in a file without running it."""
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError, OSError):
        return []
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]


def _made(found: Any, text: str) -> Any:
    """Return the model that the found object is, or makes."""
    models = (torch.nn.Module, torch.export.ExportedProgram)
    if isinstance(found, models):
        return found
    if not callable(found):
        raise BadInputError(
            describe(
                f"{text} is not a model, but a value of type {type(found).__name__}",
                wanted="a module, its class, or a function that makes one",
            )
        )
    is_class = isinstance(found, type)
    needed = _needed_parameters(found)
    if needed and not is_class:
        return found
    if needed:
        raise BadInputError(
            describe(
                f"{text} needs arguments: {found.__name__}{inspect.signature(found)}",
                wanted="a class or a function that can be called without any",
                try_=f"a factory beside it, named instead of the class:\n"
                f"def make(): return {found.__name__}({', '.join(f'{name}=...' for name in needed)})",
            )
        )
    try:
        made = found()
    except (Exception, SystemExit) as error:
        raise BadInputError(explained(f"making the model fails: {text}()", error, text.rpartition(":")[0])) from error
    if not isinstance(made, models) and not (callable(made) and not isinstance(made, type)):
        raise BadInputError(
            describe(
                f"{text}() makes not a model, but a value of type {type(made).__name__}", wanted="a torch.nn.Module"
            )
        )
    return made


def _needed_parameters(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in parameters if item.default is item.empty and item.kind not in variadic]


def explained(headline: str, error: BaseException, place: str) -> str:
    """Return the error that the user's own code raised, with the user's line."""
    if isinstance(error, SyntaxError) and error.filename:
        at = f"{Path(error.filename).name}:{error.lineno}: {(error.text or '').strip()}"
        return describe(f"{headline}: {type(error).__name__}: {error.msg}", source=at)
    frames = traceback.extract_tb(error.__traceback__)
    own = (
        [frame for frame in frames if Path(frame.filename).name == Path(place).name]
        if place.endswith(".py")
        else frames[-1:]
    )
    frame = own[-1] if own else None
    source = f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}: {frame.line}" if frame else None
    first = next(iter(str(error).splitlines()), "")
    path = Path(place)
    relative = place.endswith(".py") and "relative import" in first
    return describe(
        f"{headline}: {type(error).__name__}: {first[:300]}",
        source=source,
        try_=f"{path.parent.name}.{path.stem}:NAME from the folder above, since the file is part of a package"
        if relative
        else None,
    )
