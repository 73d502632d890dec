"""Which operators compute in half precision: ``{node: dtype}``, as a plan that can be printed, edited and saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fxopt.errors import PassError
from fxopt.name_patterns import names_fitting

__all__ = ["HALF_TYPES", "PrecisionPlan", "dtype_name", "half_dtype"]

HALF_TYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""The types of half precision by name."""

_TYPES = {**HALF_TYPES, "float32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def half_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the type of half precision that is meant: ``torch.float16`` or ``"float16"``, and bfloat16 alike.

    Raises:
        ValueError: it is another type.
    """
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype).removeprefix("torch.")
    if name not in HALF_TYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted float16 or bfloat16")
    return HALF_TYPES[name]


class PrecisionPlan(Mapping[str, torch.dtype]):
    """In which type each operator computes: ``{node: dtype}``, which is never changed but copied.

    A node of an inner graph goes by the path of its graph, ``"true_graph_0/linear"``. The type is that of the floats
    that the node reads and yields. A node that the plan does not name computes in float32; one that only moves the
    elements of one tensor, such as a view, keeps them in the type that they have. Inputs, outputs and parameters are
    not named: they follow from who reads them.

    Attributes:
        dtype: The type of half precision, float16 or bfloat16.
        reasons: Why a node stays float32, ``{node: reason}``.
    """

    def __init__(
        self,
        dtypes: Mapping[str, torch.dtype],
        reasons: Mapping[str, str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Check the types.

        Args:
            dtypes: Of each node: float32 or half.
            reasons: Why a node stays float32.
            dtype: The type of half precision; that of the nodes if not given, or float16.

        Raises:
            ValueError: a type is neither float32 nor that of half precision.
        """
        halves = dict.fromkeys(found for found in dtypes.values() if found is not torch.float32)
        self.dtype = half_dtype(dtype if dtype is not None else next(iter(halves), torch.float16))
        for node, found in dtypes.items():
            if found not in (self.dtype, torch.float32):
                raise ValueError(f"{node} is planned in {found}; wanted {self.dtype} or torch.float32")
        self._dtypes = dict(dtypes)
        self.reasons = {node: reason for node, reason in (reasons or {}).items() if node not in self.half}

    def __getitem__(self, node: str) -> torch.dtype:
        return self._dtypes[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dtypes)

    def __len__(self) -> int:
        return len(self._dtypes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrecisionPlan) and (self._dtypes, self.dtype) == (other._dtypes, other.dtype)

    def __hash__(self) -> int:
        return hash(tuple(self._dtypes.items()))

    @property
    def half(self) -> tuple[str, ...]:
        """The nodes that compute in half precision."""
        return tuple(node for node, dtype in self._dtypes.items() if dtype is self.dtype)

    @property
    def islands(self) -> dict[str, tuple[str, ...]]:
        """The nodes that stay float32 by reason: ``{reason: nodes}``; those without one are left out."""
        found: dict[str, list[str]] = {}
        for node, reason in self.reasons.items():
            found.setdefault(reason, []).append(node)
        return {reason: tuple(nodes) for reason, nodes in found.items()}

    def matching(self, *patterns: str) -> tuple[str, ...]:
        """Return the nodes whose name fits one of the patterns, ``"softmax*"``.

        Raises:
            PassError: a pattern fits none.
        """
        return names_fitting(self._dtypes, patterns, of="node of the plan")

    def changed(self, *patterns: str, dtype: torch.dtype | str, reason: str = "") -> PrecisionPlan:
        """Return the plan with another type for these nodes, ``plan.changed("softmax*", dtype="float32")``.

        Args:
            patterns: Which nodes.
            dtype: float32, or the plan's type of half precision.
            reason: Why they stay float32.

        Raises:
            PassError: a pattern fits none.
            ValueError: the plan has another type of half precision.
        """
        wanted = torch.float32 if dtype in ("float32", torch.float32) else half_dtype(dtype)
        chosen = self.matching(*patterns)
        given = dict.fromkeys(chosen, reason) if wanted is torch.float32 and reason else {}
        return PrecisionPlan(
            {**self._dtypes, **dict.fromkeys(chosen, wanted)}, {**self.reasons, **given}, dtype=self.dtype
        )

    def __str__(self) -> str:
        width = max(map(len, self._dtypes), default=0)
        return "\n".join(
            f"{node:<{width}}  {dtype_name(dtype):<8}  {self.reasons.get(node, '')}".rstrip()
            for node, dtype in self._dtypes.items()
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        held = {
            "dtype": dtype_name(self.dtype),
            "dtypes": {node: dtype_name(dtype) for node, dtype in self._dtypes.items()},
            "reasons": self.reasons,
        }
        Path(path).write_text(json.dumps(held, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecisionPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PassError: the file is not such a plan.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            dtypes = {node: _TYPES[name] for node, name in held["dtypes"].items()}
            return cls(dtypes, held.get("reasons", {}), dtype=held["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PassError(f"{os.fspath(path)} holds no precision plan: {type(error).__name__}: {error}") from error
