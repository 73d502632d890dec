"""Store the weights of layers in blocks of few bits; activations stay float.

    before:  y = linear(x, w, b);  e = embedding(table, i);  s = embedding_bag(table, i, offsets)
             z, h, c = lstm(x, (h0, c0), [w, r, b, b'])
    after:   y = matmul_nbits(x, w in blocks, scales, zero points, b);  e = gather_nbits(table in blocks, ..., i)
             s = embedding_bag(gather_nbits(table in blocks, ..., i), arange(len(i)), offsets)
             z, h, c = lstm(x, (h0, c0), [expand_nbits(w in blocks, ...), expand_nbits(r in blocks, ...), b, b'])

Every ``block_size`` numbers of a row of ``w`` share a scale, and a zero point unless ``symmetric``. A weight that
several calls read is quantized once, if all of them can read it in blocks. ONNX Runtime 1.32 on a CPU has the kernels
for 2, 4 and 8 bits (com.microsoft's MatMulNBits and GatherBlockQuantized); they expand blocks while they multiply, so
that memory and file stay small. A product of floats stays one: ``accuracy_level=4`` lets ORT round the activations to
8 bits instead, which the graph does not imitate. Recurrent layers and convolutions have no such kernel: their files are
as small, and ORT computes their float weights once, when it loads the file.

Which is faster depends on the kernels. One sentence through MiniLM-L6 took 6.7 ms with float weights on two cores of an
x86-64 server; in f32 7.0 with 4 bits, 29 with 8 and 37 with 2; with ``accuracy_level=4`` 4.4, 5.8 and 5.6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch

from fxopt.args import arg, dtype, shape, tensor_arg
from fxopt.calibration_data import calibration_of
from fxopt.contracts import Contract
from fxopt.grouped_ops import GROUPED_MM
from fxopt.layer_operators import CELLS, CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS
from fxopt.pass_base import Pass
from fxopt.passes.quantize.block_rounding import rounded_by_gptq
from fxopt.passes.quantize.blocks import (
    BITS,
    SMALLEST_BLOCK,
    BlockWeight,
    Search,
    block_size_problem,
    quantize_blocks,
)
from fxopt.passes.quantize.grouped_blocks import calls_of, grouped_refusal, outputs_in_rows
from fxopt.passes.quantize.matrix_uses import INPUT, LOOKUPS, WEIGHT, MatrixUse, behind_transpositions
from fxopt.passes.quantize.stored_weights import (
    LayerWeight,
    StoredWeights,
    check_kinds,
    check_names,
    refusal,
    replace_weight,
    tensor_bytes,
)
from fxopt.rewriter import Rewriter
from fxopt.weight_only_ops import EXPAND_NBITS, GATHER_NBITS, GROUPED_MATMUL_NBITS, MATMUL_NBITS

__all__ = ["TABLES", "QuantizeWeights"]

Node = torch.fx.Node
aten = torch.ops.aten
_FLOORS = {2: 0.0, 4: 8.0, 8: 25.0}  # dB; int8 activations alone leave some 30
_KINDS = ("linear", "embedding", "recurrent")
_EXPANDED = {"recurrent": (*RECURRENT, *CELLS), "convolution": (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)}
_ACCURACY_LEVELS = (0, 1, 4)  # what the CPU kernels know: f32 without and with asking for it, and int8


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize constant matrices in blocks, weights only.

    Attributes:
        bits: Width of the integers: 2, 4 or 8.
        block_size: Numbers that share a scale: a power of two, 16 or more; fewer where rows are shorter.
        symmetric: Leave out zero points: a little smaller, a little less accurate.
        search: How the range of a block is chosen; see :func:`quantize_blocks`.
        rounding: ``"nearest"``, or ``"gptq"``, by which on the calibration inputs the errors of some weights make up
            for those of others; see :mod:`fxopt.passes.quantize.block_rounding`.
        kinds: What is quantized: "linear" (products with any constant matrix, those of experts too), "embedding" (bags
            of them, too), "recurrent" (LSTM, GRU and RNN layers and cells); "convolution" too if it is named, whose
            weights bear 8 bits, and fewer after training only.
        skip: Patterns of names of weights, nodes or modules that stay as they are.
        min_elements: Smaller weights stay as they are.
        accuracy_level: In which type ORT multiplies: 0 leaves it to ORT, which takes f32; 1 f32; 4 int8 activations.
        damping: What GPTQ adds to the diagonal of its Hessian, as a share of the mean: more for few calibration inputs.
            On MiniLM-L6 with 64 sentences 0.01, the paper's, gained 0.4 dB on other sentences, 0.1 to 0.5 1.8 dB; with
            304 sentences 1.8 and 2.3.
        megabytes: Memory for the activations of the calibration inputs of GPTQ, which takes in as many as fit.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB; if not given, 0 for 2
            bits, 8 for 4, 25 for 8.
    """

    name: ClassVar[str] = "quantize-weights"
    evaluation_only: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "bits=8, smaller blocks (block_size=16), rounding='gptq', kinds=('linear', 'embedding'), "
        "skip=('NAME*',); min_sqnr_db=... if less will do"
    )
    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    search: Search = "mse"
    rounding: Literal["nearest", "gptq"] = "nearest"
    kinds: tuple[str, ...] = _KINDS
    skip: tuple[str, ...] = ()
    min_elements: int = 4096
    accuracy_level: int = 0
    damping: float = 0.1
    megabytes: int = 2048
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; wanted {', '.join(map(str, BITS))}")
        if (problem := block_size_problem(self.block_size)) is not None:
            raise ValueError(problem)
        if self.search not in ("absmax", "mse"):
            raise ValueError(f"search is {self.search!r}; wanted 'absmax' or 'mse'")
        if self.rounding not in ("nearest", "gptq"):
            raise ValueError(f"rounding is {self.rounding!r}; wanted 'nearest' or 'gptq'")
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}; wanted above 0, or the Hessian may have no inverse")
        if self.accuracy_level not in _ACCURACY_LEVELS:
            raise ValueError(f"accuracy_level is {self.accuracy_level}; wanted one of {_ACCURACY_LEVELS}")
        check_kinds(self.kinds, (*_KINDS, "convolution"))
        check_names(self.skip)

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # an option here, a constant in other passes
        """The promise about the outputs."""
        return Contract.lossy("sqnr_db", _FLOORS[self.bits] if self.min_sqnr_db is None else self.min_sqnr_db)

    def run(self, rw: Rewriter) -> None:
        """Quantize every constant matrix whose readers all allow it.

        Raises:
            CalibrationError: GPTQ is asked for, and the calibration data do not fit.
        """
        self.store(rw, lambda reader: False)

    def store(self, rw: Rewriter, leaves: Callable[[Node], bool]) -> None:
        """Do what :meth:`run` does, where some calls will read other integers than those stored here.

        Args:
            rw: Of the pass.
            leaves: Whether a call that reads a matrix will stop to, so that its floats need not stay for it.
        """
        stored = _Blocks(self, rw, leaves)
        if self.rounding == "gptq":
            stored.round_by_gptq()
        for call in rw.calls(*(target for target in WEIGHT if self.takes(target))):
            use = MatrixUse.of(call)
            if use is None:
                if call.target is aten.linear.default:
                    inside = tensor_arg(call, "weight").op == "placeholder"
                    rw.skip(call, f"its weight is {'handed in' if inside else 'computed'} when the graph runs")
                continue
            reason = stored.refusal(use)
            if reason is not None:
                rw.skip(call, reason)
            else:
                _replace(rw, use, stored.nodes(use), self)
        stored.group()
        stored.expand()
        if self.kinds == _KINDS:  # what is not asked about needs no reason
            for call in rw.calls(*_EXPANDED["convolution"]):
                rw.skip(call, "it is a convolution, which stays unless it is asked for: kinds=(..., 'convolution')")
        if stored.bytes_before:
            rw.notes.append(f"weights of {stored.bytes_before} bytes take {stored.bytes_after} bytes in blocks")

    def takes(self, target: Any) -> bool:
        """Return whether an operator is of a kind that is quantized."""
        return ("embedding" if target in LOOKUPS else "linear") in self.kinds


TABLES = QuantizeWeights(bits=8, search="absmax", kinds=("embedding",))
"""The tables of embeddings in 8 bits, with an error of 46 dB below the numbers; the search would gain 0.1 dB."""


class _Blocks:
    """The matrices in blocks: which can be, and the nodes that read what was stored for them."""

    def __init__(self, options: QuantizeWeights, rw: Rewriter, leaves: Callable[[Node], bool]) -> None:
        self.options, self.rw, self._leaves = options, rw, leaves
        self.bytes_before = self.bytes_after = 0
        self._readers = StoredWeights(rw)
        self._refusals: dict[int, str | None] = {}
        self._weights: dict[int, BlockWeight] = {}
        self._nodes: dict[tuple[int, torch.fx.Graph], tuple[Node, Node, Node | None]] = {}

    def refusal(self, use: MatrixUse) -> str | None:
        """Return why the call keeps its floats, or None."""
        tensor = self.rw.tensor(use.read)
        if id(tensor) not in self._refusals:  # before the first change: afterwards others read it
            self._refusals[id(tensor)] = self._weight_refusal(use, tensor)
        return self._refusals[id(tensor)] or _call_refusal(use.call)

    def round_by_gptq(self) -> None:
        """Choose the integers of all matrices of the graph itself anew, before the first change."""
        calls = [node for node in self.rw.gm.graph.nodes if self.options.takes(node.target)]
        uses = [use for call in calls if (use := MatrixUse.of(call)) is not None and self.refusal(use) is None]
        held = [(use, self._quantized(use, self.rw.tensor(use.read))) for use in uses]
        data, options = calibration_of(self.rw.gm), self.options
        found = rounded_by_gptq(self.rw.gm, held, data, damping=options.damping, megabytes=options.megabytes)
        for use, weight in found.items():
            self._weights[id(self.rw.tensor(use.read))] = weight
        every = len(self._weights)
        others = ", the others, embeddings or read by several calls, to nearest" if len(found) < every else ""
        self.rw.notes.append(f"{len(found)} of {every} matrices rounded by GPTQ{others}")

    def group(self) -> None:
        """Let products of groups of rows read the matrices of all groups in blocks."""
        options = self.options
        targets = [GROUPED_MM] if options.takes(GROUPED_MM) else []
        for weight in self._readers.weights(self.rw, targets, skip=options.skip, min_elements=options.min_elements):
            if (reason := grouped_refusal(weight)) is not None:
                self.rw.skip(weight.layer, reason)
            else:
                self._group(weight)

    def _group(self, weight: LayerWeight) -> None:
        matrices, options = outputs_in_rows(weight), self.options
        held = self._in_blocks(matrices.flatten(0, 1))
        if not self._saves(weight, held):
            return
        why = f"{weight.path}, {len(matrices)} matrices, in {options.bits} bits, blocks of {held.block_size}"
        of_groups = held.in_groups(len(matrices))
        nodes = self._constants(weight.path, of_groups, near=weight.first_reader)
        form = (options.bits, held.block_size, held.features_in, options.accuracy_level)
        for call, _ in calls_of(weight):
            operands = (tensor_arg(call, "x"), *nodes, tensor_arg(call, "offsets"))
            self.rw.replace_call(call, GROUPED_MATMUL_NBITS, (*operands, *form), why=why)

    def _saves(self, weight: LayerWeight, held: BlockWeight) -> bool:
        """Return whether blocks take fewer bytes than the weight, and count or refuse it."""
        small, large = held.nbytes, tensor_bytes(weight.tensor)
        if small >= large:
            self.rw.skip(weight.layer, f"its blocks would take {small} bytes instead of {large}")
            return False
        self.bytes_before, self.bytes_after = self.bytes_before + large, self.bytes_after + small
        return True

    def expand(self) -> None:
        """Let layers that have no kernel of blocks read what the blocks of their weights are expanded to."""
        options = self.options
        layers = [target for kind, targets in _EXPANDED.items() if kind in options.kinds for target in targets]
        for weight in self._readers.weights(self.rw, layers, skip=options.skip, min_elements=options.min_elements):
            self._expand(weight)

    def _expand(self, weight: LayerWeight) -> None:
        rows, options = weight.tensor.detach().flatten(1), self.options
        held = self._in_blocks(rows)
        if not self._saves(weight, held):
            return
        first, why = weight.first_reader, f"{weight.path} in {options.bits} bits, blocks of {held.block_size}"
        nodes = self._constants(weight.path, held, near=first)
        arguments = (*nodes, options.bits, held.block_size, list(weight.tensor.shape))
        replace_weight(self.rw, weight, self.rw.insert_call(EXPAND_NBITS, arguments, before=first, why=why), why=why)

    def _weight_refusal(self, use: MatrixUse, tensor: torch.Tensor) -> str | None:
        options, reads = self.options, self._readers.reads(tensor)
        if (reason := refusal(use.call, reads, tensor, options.skip, options.min_elements)) is not None:
            return reason
        if tensor.ndim != 2:
            return f"its constant operand has {tensor.ndim} axes, not 2"
        for user in [user for read in reads for reader in read.users for user, _ in behind_transpositions(reader)]:
            if self._leaves(user):
                continue
            other = MatrixUse.of(user)
            if other is None or self.rw.tensor(other.read) is not tensor or not options.takes(user.target):
                return f"its weight is also read by {user.name} ({user.target})"
            if _call_refusal(user) is not None and user is not use.call:
                return f"its weight is also read by {user.name}: {_call_refusal(user)}"
            if other.by_rows != use.by_rows:
                return f"its weight is read transposed by {user.name}"
        stored = self._quantized(use, tensor)
        if stored.nbytes >= tensor_bytes(tensor):
            del self._weights[id(tensor)]
            return f"its blocks would take {stored.nbytes} bytes instead of {tensor_bytes(tensor)}"
        return None

    def _quantized(self, use: MatrixUse, tensor: torch.Tensor) -> BlockWeight:
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = self._in_blocks(tensor.detach() if use.by_rows else tensor.detach().t())
        return self._weights[id(tensor)]

    def _in_blocks(self, rows: torch.Tensor) -> BlockWeight:
        options = self.options
        return quantize_blocks(
            rows,
            bits=options.bits,
            block_size=_no_larger(options.block_size, rows.shape[1]),
            symmetric=options.symmetric,
            search=options.search,
        )

    def nodes(self, use: MatrixUse) -> tuple[Node, Node, Node | None]:
        """Return the nodes that read integers, scales and zero points, in the graph of the call."""
        tensor = self.rw.tensor(use.read)
        key = (id(tensor), use.call.graph)
        if key not in self._nodes:
            held = self._quantized(use, tensor)
            if not any(known == id(tensor) for known, _ in self._nodes):
                self.bytes_before += tensor_bytes(tensor)
                self.bytes_after += held.nbytes
            self._nodes[key] = self._constants(str(use.read.target), held, near=use.call)
        return self._nodes[key]

    def _constants(self, path: str, held: BlockWeight, *, near: Node) -> tuple[Node, Node, Node | None]:
        packed, scales, *others = (
            self.rw.constant(f"{path}_{kind}", part, near=near)
            for kind, part in (("blocks", held.packed), ("scales", held.scales), ("zero_points", held.zero_points))
            if part is not None
        )
        return packed, scales, others[0] if others else None


def _no_larger(block_size: int, row: int) -> int:
    """Return the size of a block that is no larger than a row needs: the rest of it would be padding."""
    return min(block_size, max(SMALLEST_BLOCK, 1 << (row - 1).bit_length()))


def _call_refusal(call: Node) -> str | None:
    if call.target in LOOKUPS:
        return None if call.target is aten.embedding.default else _bags_refusal(call)
    x = tensor_arg(call, INPUT[call.target])
    if dtype(x) is not torch.float32:
        return f"its input is {dtype(x)}"
    if call.target is aten.addmm.default:
        if arg(call, "alpha") != 1 or arg(call, "beta") != 1:
            return "alpha or beta is not 1"
        if len(shape(tensor_arg(call, "self"))) != 1 or shape(tensor_arg(call, "self"))[0] != shape(call)[-1]:
            return "what is added is no vector of its outputs"
    return None


def _bags_refusal(call: Node) -> str | None:
    if call.target is aten.embedding_bag.padding_idx and arg(call, "padding_idx") is not None:
        return "rows of its padding do not count"
    others = any(user.args[1] != 0 and user.users for user in call.users)
    return "more than the sums of its bags is read" if others else None


def _replace(rw: Rewriter, use: MatrixUse, nodes: tuple[Node, Node, Node | None], options: QuantizeWeights) -> None:
    packed, scales, zero_points = nodes
    tensor = rw.tensor(use.read)
    features_in = tensor.shape[1 if use.by_rows else 0]
    block_size = _no_larger(options.block_size, features_in)
    form = (options.bits, block_size, features_in)
    why = f"weight {use.read.target} in {options.bits} bits, blocks of {block_size}"
    if use.call.target in LOOKUPS:
        index = tensor_arg(use.call, "indices")
        look_up = GATHER_NBITS, (packed, scales, zero_points, index, *form)
        if use.call.target is aten.embedding.default:
            rw.replace_call(use.call, *look_up, why=why)
        else:
            _gather_for_bags(rw, use, rw.insert_call(*look_up, before=use.call, why=why), why)
        return
    x = tensor_arg(use.call, INPUT[use.call.target])
    biases: dict[Any, str] = {aten.linear.default: "bias", aten.addmm.default: "self"}
    bias = biases.get(use.call.target)
    added = None if bias is None else arg(use.call, bias)
    rw.replace_call(
        use.call, MATMUL_NBITS, (x, packed, scales, zero_points, *form, added, options.accuracy_level), why=why
    )


def _gather_for_bags(rw: Rewriter, use: MatrixUse, rows: Node, why: str) -> None:
    """Let bags sum up the rows of their indices, one after the other, in place of rows of the table."""
    index = tensor_arg(use.call, "indices")
    count = shape(index)[0]
    if not isinstance(count, int):
        count = rw.insert_call(aten.sym_size.int, (index, 0), before=use.call, why=why)
    every = rw.insert_call(aten.arange.default, (count,), {"dtype": dtype(index)}, before=use.call, why=why)
    rw.replace_argument(use.call, use.operand, rows, why=why)
    rw.set_arg(use.call, "indices", every, why=why)
