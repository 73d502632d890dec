"""Store the weights of layers as signs, or as -1, 0 and 1, with one float factor for each output channel.

    before:  y = conv2d(x, w, b)
    after:   w' = mul(lookup_nbits(codes of w, (-1, 1), 1, shape of w), alpha);  y = conv2d(x, w', b)
    train:   y = conv2d(x, binarize_ste(w), b)

Binary: ``alpha`` is the mean magnitude of a channel, and a sign takes 1 bit (Rastegari et al.: XNOR-Net, ECCV 2016).
Ternary: what is not above 0.7 mean magnitudes becomes 0, ``alpha`` is the mean of the other magnitudes, and a code
takes 2 bits (Li, Liu: Ternary Weight Networks, 2016). Both lose much of the accuracy, and training brings it back: with
``train`` the float weights stay parameters, which the forward pass rounds and the backward pass does not (Courbariaux
et al.: Binarized Neural Networks, 2016). The pass without ``train`` turns such a graph into the packed one, to the same
numbers.

The file is small, and not the run: ONNX Runtime multiplies by the float weight, which it computes when it loads the
file.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch

from fxopt.args import tensor_arg
from fxopt.graph_module import graph_modules
from fxopt.layer_operators import CONVOLUTIONS
from fxopt.pass_base import LossyPass
from fxopt.passes.quantize.stored_weights import LayerWeight, StoredWeights, check_names, replace_weight
from fxopt.rewriter import Rewriter
from fxopt.weight_only_ops import BINARIZE_STE, LOOKUP_NBITS, TERNARIZE_STE, pack_bits

__all__ = ["BinarizeWeights", "binary_weight", "ternary_weight"]

Node = torch.fx.Node
Kind = Literal["binary", "ternary"]
aten = torch.ops.aten
_LAYERS = (*CONVOLUTIONS, aten.linear.default)
_STE = {"binary": BINARIZE_STE, "ternary": TERNARIZE_STE}
_BITS = {"binary": 1, "ternary": 2}
_TABLES = {"binary": (-1.0, 1.0), "ternary": (0.0, 1.0, -1.0, 0.0)}


@dataclasses.dataclass(frozen=True)
class BinarizeWeights(LossyPass):
    """Replace the weights of convolutions and linear layers by signs, or by -1, 0 and 1.

    A graph that this pass made for training is turned into the packed form; its other weights stay as they are.

    Attributes:
        kind: ``"binary"`` or ``"ternary"``.
        train: Keep float weights as parameters, and round them on each run.
        keep_ends: Leave the first and the last layer as they are, as the papers do.
        skip: Patterns of names of weights or nodes that stay as they are.
        min_elements: Smaller weights stay as they are.
        min_sqnr_db: Signal to noise that every output must keep on the example inputs, in dB. The default refuses
            only nonsense: such a net is of use after training.
    """

    name: ClassVar[str] = "binarize-weights"
    evaluation_only: ClassVar[bool] = True
    kind: Kind = "binary"
    train: bool = False
    keep_ends: bool = True
    skip: tuple[str, ...] = ()
    min_elements: int = 1024
    min_sqnr_db: float = -20.0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.kind not in _STE:
            raise ValueError(f"kind is {self.kind!r}; wanted 'binary' or 'ternary'")
        check_names(self.skip)

    def run(self, rw: Rewriter) -> None:
        """Pack what was made for training; if there is nothing of that kind, replace the weights of layers."""
        trained = any(node.target in _STE.values() for gm in graph_modules(rw.gm) for node in gm.graph.nodes)
        if trained and not self.train:
            _pack_trained(rw)
        elif not trained:
            self._replace_all(rw)

    def _replace_all(self, rw: Rewriter) -> None:
        ends = _ends(rw) if self.keep_ends else frozenset()
        weights = StoredWeights(rw).weights(rw, _LAYERS, skip=self.skip, min_elements=self.min_elements)
        for weight in weights:
            if weight.layer in ends:
                rw.skip(weight.layer, "it is the first or the last layer")
            elif self.train:
                _insert_rounding(rw, weight, self.kind)
            else:
                packed = _packed(rw, weight.first_reader, weight.tensor, self.kind, weight.path)
                replace_weight(rw, weight, packed, why=f"{weight.path} is {self.kind}")


def binary_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return signs and factors of a weight.

    Args:
        weight: f32[out, ...].

    Returns:
        codes: i64[out, n], 1 where the weight is 0 or above.
        alpha: f32[out], the mean magnitude of each channel. No other factor has a smaller squared error.
    """
    rows = weight.detach().flatten(1)
    return (rows >= 0).long(), rows.abs().mean(1)


def ternary_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and factors of a weight: 0 stands for 0, 1 for alpha, 2 for -alpha.

    Args:
        weight: f32[out, ...].

    Returns:
        codes: i64[out, n], in 0, 1, 2.
        alpha: f32[out], 0 for a channel of zeros.
    """
    rounded = TERNARIZE_STE(weight.detach()).flatten(1)
    codes = torch.where(rounded > 0, 1, torch.where(rounded < 0, 2, 0))
    return codes, rounded.abs().amax(1)


def _ends(rw: Rewriter) -> frozenset[Node]:
    """Return the first and the last layer of the graph, whatever their weights are stored as."""
    layers = [node for node in rw.gm.graph.nodes if node.op == "call_function" and node.target in _LAYERS]
    return frozenset((layers[0], layers[-1])) if layers else frozenset()


def _insert_rounding(rw: Rewriter, weight: LayerWeight, kind: Kind) -> None:
    first, *others = weight.reads
    why = f"{weight.path} is trained as {kind}"
    readers = list(first.users)
    rounded = rw.insert_call(_STE[kind], (first,), before=weight.first_reader, why=why, sources=[weight.layer])
    for reader in readers:
        rw.replace_argument(reader, first, rounded, why=why)
    for other in others:
        rw.replace_value(other, rounded, why=why)


def _pack_trained(rw: Rewriter) -> None:
    for call in rw.calls(*_STE.values()):
        weight = tensor_arg(call, "weight")
        if weight.op != "get_attr":
            rw.skip(call, "its weight is computed when the graph runs")
            continue
        kind: Kind = "binary" if call.target is BINARIZE_STE else "ternary"
        packed = _packed(rw, call, rw.tensor(weight), kind, str(weight.target))
        rw.replace_value(call, packed, why=f"{weight.target} is {kind}")


def _packed(rw: Rewriter, before: Node, tensor: torch.Tensor, kind: Kind, path: str) -> Node:
    """Insert what computes the weight from its codes, and return it."""
    codes, alpha = binary_weight(tensor) if kind == "binary" else ternary_weight(tensor)
    bits, shape = _BITS[kind], list(tensor.shape)
    held = rw.constant(f"{path}_codes", pack_bits(codes, bits), near=before)
    table = rw.constant(f"{path}_signs", torch.tensor(_TABLES[kind]), near=before)
    factors = alpha.reshape(-1, *[1] * (tensor.ndim - 1))
    alpha_node = rw.constant(f"{path}_alpha", factors, near=before, trainable=tensor.requires_grad)
    why = f"{path} in {bits} bits"
    signs = rw.insert_call(LOOKUP_NBITS, (held, table, bits, shape), before=before, why=why)
    return rw.insert_call(aten.mul.Tensor, (signs, alpha_node), before=before, why=why)
