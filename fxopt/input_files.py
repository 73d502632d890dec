"""Example inputs from files: numpy arrays and torch tensors."""

from __future__ import annotations

import os
import re
import zipfile
from typing import Any

import numpy as np
import torch

from fxopt.dimensions import Sample

__all__ = ["FILE_SUFFIXES", "read_inputs"]

FILE_SUFFIXES = (".npy", ".npz", ".pt", ".pth")


def read_inputs(path: str | os.PathLike[str]) -> tuple[Sample, ...]:
    """Return the samples that a file holds.

    An ``.npy`` is one positional argument. Arrays of an ``.npz`` are positional arguments if they are called ``arr_0``,
    ``arr_1``, ... as numpy calls arrays without a name, and keyword arguments otherwise. A ``.pt`` or ``.pth`` holds a
    tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of such samples.

    Raises:
        ValueError: the file is missing or damaged, or holds something else than arrays, tensors and numbers.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    if path.lower().endswith((".npy", ".npz")):
        return (_numpy_sample(path),)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler stumbles over a foreign file in many ways: KeyError, struct.error, ...
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is not a file of tensors, or is damaged: {first[:200]}") from error
    samples = tuple(Sample.of(item) for item in content) if isinstance(content, list) else (Sample.of(content),)
    if not samples:
        raise ValueError(f"{path} holds an empty list; wanted at least one sample")
    for leaf in samples[0].leaves():
        if leaf is not None and not isinstance(leaf, torch.Tensor | bool | int | float):
            raise ValueError(f"{path} holds a {type(leaf).__name__}; wanted tensors and numbers")
    return samples


def _numpy_sample(path: str) -> Sample:
    try:
        with open(path, "rb") as file:  # np.load by name leaves a damaged file open
            content = np.load(file, allow_pickle=False)
            arrays = dict(content) if isinstance(content, np.lib.npyio.NpzFile) else {"arr_0": content}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of numpy arrays, or is damaged: {error}") from error
    unnamed = all(re.fullmatch(r"arr_\d+", name) for name in arrays)
    tensors: dict[str, Any] = {name: _tensor(path, name, array) for name, array in arrays.items()}
    if not tensors:
        raise ValueError(f"{path} holds no array")
    if unnamed:
        return Sample(tuple(tensors[name] for name in sorted(tensors, key=lambda name: int(name[4:]))))
    return Sample((), tensors)


def _tensor(path: str, name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: array {name!r} has element type {array.dtype}, which torch does not have") from None
