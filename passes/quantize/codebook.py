"""Store the weights of layers as places in a table of few numbers.

    before:  y = conv2d(x, w, b)
    after:   w' = lookup_nbits(places of w in the table, packed, table, bits, shape of w);  y = conv2d(x, w', b)

The entries of a table of k-means stay trainable where the weight was: the gradient of an entry is the sum over the
elements that hold it, so that any optimizer tunes the table (Han, Mao, Dally: Deep Compression, ICLR 2016). Those of
the other tables would leave their form, and are constants.

The file is small, and not the run: ONNX Runtime has no kernel that multiplies by a table. With its optimizer on it
computes the float weight once, when it loads the file; with the optimizer off, on each run.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.contracts import Contract
from fxopt.grouped_ops import GROUPED_MM
from fxopt.layer_operators import CELLS, CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS
from fxopt.pass_base import Pass
from fxopt.passes.quantize.stored_weights import (
    LayerWeight,
    StoredWeights,
    check_names,
    replace_weight,
    tensor_bytes,
)
from fxopt.passes.quantize.tables import Table, nearest_codes, number_table
from fxopt.rewriter import Rewriter
from fxopt.weight_only_ops import LOOKUP_NBITS, pack_bits

__all__ = ["CodebookWeights"]

aten = torch.ops.aten
_LAYERS = (
    *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, aten.linear.default, aten.embedding.default, *RECURRENT, *CELLS,
    GROUPED_MM,
)  # fmt: skip
_BITS = (1, 2, 4, 8)
_FLOORS = {1: -10.0, 2: -3.0, 4: 5.0, 8: 20.0}  # dB


@dataclasses.dataclass(frozen=True)
class CodebookWeights(Pass):
    """Replace weights of convolutions, linear and recurrent layers and embeddings by places in tables.

    Attributes:
        bits: Width of a place: 1, 2, 4 or 8; a table has ``2**bits`` entries.
        table: ``"kmeans"``, ``"uniform"`` or ``"power-of-two"``; see :func:`number_table`.
        channels: Output channels that share a table; 0 is one table for the whole weight.
        skip: Patterns of names of weights or nodes that stay as they are.
        min_elements: Smaller weights stay as they are.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB; if not given, -10 for 1
            bit, -3 for 2, 5 for 4, 20 for 8.
    """

    name: ClassVar[str] = "codebook-weights"
    evaluation_only: ClassVar[bool] = True
    bits: int = 4
    table: Table = "kmeans"
    channels: int = 0
    skip: tuple[str, ...] = ()
    min_elements: int = 1024
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.bits not in _BITS:
            raise ValueError(f"bits is {self.bits}; wanted {', '.join(map(str, _BITS))}")
        if self.table not in ("kmeans", "uniform", "power-of-two"):
            raise ValueError(f"table is {self.table!r}; wanted 'kmeans', 'uniform' or 'power-of-two'")
        if self.table == "power-of-two" and self.bits == 1:
            raise ValueError("a table of powers of two needs 2 bits or more; wanted bits 2, 4 or 8")
        if self.channels < 0:
            raise ValueError(f"channels is {self.channels}; wanted 0 or more")
        check_names(self.skip)

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # an option here, a constant in other passes
        """The promise about the outputs."""
        return Contract.lossy("sqnr_db", _FLOORS[self.bits] if self.min_sqnr_db is None else self.min_sqnr_db)

    def run(self, rw: Rewriter) -> None:
        """Replace every weight that is large enough for it to pay."""
        weights = StoredWeights(rw).weights(rw, _LAYERS, skip=self.skip, min_elements=self.min_elements)
        for weight in weights:
            rows = weight.tensor.detach().flatten(1)
            if self.channels and rows.shape[0] % self.channels:
                rw.skip(weight.layer, f"{rows.shape[0]} channels are no multiple of {self.channels}")
                continue
            codes, tables = self._coded(rows)
            packed = pack_bits(codes, self.bits)
            small, large = tensor_bytes(packed, tables), tensor_bytes(weight.tensor)
            if small >= large:
                rw.skip(weight.layer, f"places and tables would take {small} bytes instead of {large}")
                continue
            _replace(rw, weight, packed, tables, self)

    def _coded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the places i64[out, n], and the table f32[entries] or the tables f32[groups, entries]."""
        entries = 2**self.bits
        if not self.channels:
            table = number_table(rows, entries, self.table)
            return nearest_codes(rows, table), table
        tables = [number_table(group, entries, self.table) for group in rows.split(self.channels)]
        codes = [nearest_codes(*pair) for pair in zip(rows.split(self.channels), tables, strict=True)]
        return torch.cat(codes), torch.stack(tables)


def _replace(
    rw: Rewriter, weight: LayerWeight, packed: torch.Tensor, tables: torch.Tensor, options: CodebookWeights
) -> None:
    first, path = weight.first_reader, weight.path
    trainable = weight.tensor.requires_grad and options.table == "kmeans"
    places = rw.constant(f"{path}_places", packed, near=first)
    table = rw.constant(f"{path}_table", tables, near=first, trainable=trainable)
    shape = list(weight.tensor.shape)
    why = f"{path} in {options.bits} bits"
    looked_up = rw.insert_call(LOOKUP_NBITS, (places, table, options.bits, shape), before=first, why=why)
    replace_weight(rw, weight, looked_up, why=why)
