"""Put quantizers into a graph that is to be trained with them: quantization-aware training.

    before:  y = relu(batch_norm(conv2d(x, w), gamma, beta, mean, var));  z = linear(y, v, b)
    after:   xq = fake_quantize(x, ...);  wq = fake_quantize(w, ...)
             y = relu(batch_norm(conv2d(xq, wq), gamma, norm_bias(...), mean, var));  yq = fake_quantize(y, ...)
             z = linear(yq, fake_quantize(v, ...), fake_quantize_bias(b, ...))

The quantizers stand where :class:`Quantize` would put them: a copy is made ready for integers, and its layout taken.
A batch norm stays an operator, in train and in eval mode (see :mod:`fxopt.passes.quantize.conv_bn`); so do dropout and
everything else that makes up training. Gradients go straight through the rounding (Bengio et al., 2013); scales stay as
calibrated, or are learned (Esser et al., Learned Step Size Quantization, ICLR 2020).

Train the graph as any other module. Its state is parameters and buffers alone, so that every loop, optimizer, DDP and
state_dict work. Then ``convert-qat`` makes the integers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from fxopt.changes import Skip
from fxopt.errors import PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.pass_base import LossyPass, Pass, run_passes
from fxopt.passes.cleanup import FoldConstants, FuseActivations, RemoveIdentities, SimplifyAlgebra
from fxopt.passes.quantize.conv_bn import as_integer_layers
from fxopt.passes.quantize.fake_quantizers import FakeQuantizers, FirstScales
from fxopt.passes.quantize.insert_qdq import refuse_quantized
from fxopt.passes.quantize.layout import Layout
from fxopt.passes.quantize.placement import node_names, path_of, place
from fxopt.passes.quantize.preparation import BEHIND_NORMS
from fxopt.passes.quantize.ranges import RangeMethod
from fxopt.passes.quantize.resolve import resolve
from fxopt.passes.quantize.spec import WIDTHS, QuantPlan
from fxopt.passes.quantize.target import TARGETS
from fxopt.rewriter import Rewriter

__all__ = ["PrepareQat"]

_SAFE_IN_BOTH_MODES: tuple[Pass, ...] = (
    RemoveIdentities(),
    SimplifyAlgebra(),
    FoldConstants(),
    FuseActivations(),
    *BEHIND_NORMS,
)


@dataclasses.dataclass(frozen=True)
class PrepareQat(LossyPass):
    """Insert differentiable quantizers.

    Attributes:
        bits: Width of activations.
        weight_bits: Width of weights; that of activations, but at most 8, if None.
        method: How the first range of activations is chosen; see :class:`Quantize`.
        target: The runtime that the integers are for: ``"ort-cpu"`` or ``"onnx"``.
        plan: What to quantize, as ``Quantize().make_plan(graph)`` returns it; scales that are left open are calibrated.
        skip: Patterns of what stays float: names of calls, parameters or modules; of nodes where a plan is given.
        learn_scales: Make the scales trainable parameters.
        no_saturation: Choose scales of 8-bit weights with which 16-bit sums of CPUs without VNNI cannot overflow.
        min_sqnr_db: Signal to quantization noise that every output must have before training, in dB. Training is to
            make it better, so the default only finds what is broken.
    """

    name: ClassVar[str] = "prepare-qat"
    needs: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    ends: ClassVar[frozenset[str]] = frozenset({"no-qdq"})
    evaluation_only: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    bits: int = 8
    weight_bits: int | None = None
    method: str = "mse"
    target: str = "ort-cpu"
    plan: QuantPlan | None = dataclasses.field(default=None, repr=False)
    skip: tuple[str, ...] = ()
    learn_scales: bool = False
    no_saturation: bool = True
    min_sqnr_db: float = -20.0

    def __post_init__(self) -> None:
        """Check the options."""
        for width in (self.bits, self.weight_bits):
            if width is not None and width not in WIDTHS:
                raise ValueError(f"a width of {width} bits; wanted one of {', '.join(map(str, WIDTHS))}")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; wanted one of {', '.join(TARGETS)}")
        if self.plan is not None and not isinstance(self.plan, QuantPlan):
            raise TypeError(f"plan is a {type(self.plan).__name__}; wanted a QuantPlan")
        RangeMethod.of(self.method)

    def run(self, rw: Rewriter) -> None:
        """Insert the quantizers.

        Raises:
            PassError: the graph is quantized already, has one mode only, or the plan does not fit it.
            CalibrationError: the calibration data are empty, do not fit, or hold NaN.
        """
        refuse_quantized(rw, self.name)
        _refuse_one_mode(rw.gm)
        skips = len(rw.skips)
        run_passes(rw, _SAFE_IN_BOTH_MODES)
        del rw.skips[skips:]  # what those passes left alone is not what this one is asked about
        evaluation = Rewriter(_in_evaluation(rw.gm), self.name)
        folded = as_integer_layers(evaluation)
        evaluation.finish()
        rw.skips += evaluation.skips
        plan = self._resolved(evaluation.gm)
        rw.skips += [Skip(node, reason, None, self.name) for node, reason in plan.notes.items()]
        if not plan:
            reason = f"{self.target} computes nothing of this graph in integers, so there is nothing to train for"
            rw.skips.append(Skip("output", reason, None, self.name))
        prefixes, twins = path_of(evaluation.gm), dict(evaluation.gm.named_modules())
        for path, module in list(rw.gm.named_modules()):
            if isinstance(module, torch.fx.GraphModule) and path in twins:
                graph = twins[path].graph
                layout = Layout(graph, plan, TARGETS[self.target], prefixes[graph])
                FakeQuantizers(rw, module.graph, layout, folded, prefixes[graph], self._first_scales()).insert()

    def _first_scales(self) -> FirstScales:
        given = () if self.plan is None else [name for name, spec in self.plan.items() if spec.resolved]
        return FirstScales(frozenset(given), learned=self.learn_scales, no_saturation=self.no_saturation)

    def _resolved(self, evaluation: CapturedModule) -> QuantPlan:
        target = TARGETS[self.target]
        plan = self.plan
        if plan is None:
            plan = place(evaluation, target, bits=self.bits, weight_bits=self.weight_bits, skip=self.skip)
        else:
            _refuse_unknown(evaluation, plan)
            plan = plan.without(*self.skip) if self.skip else plan
        (resolved,) = resolve(evaluation, plan, target, (self.method,), no_saturation=self.no_saturation)
        return resolved


def _refuse_one_mode(gm: CapturedModule) -> None:
    if gm.modes != "both":
        raise PassError(
            describe(
                f"the graph is valid in {gm.modes} mode only, and quantization-aware training needs both modes",
                because=gm.modes_reason or None,
                try_="fxopt.capture(model, example_inputs), of the module itself; freeze-mode and the like come after",
            )
        )


def _refuse_unknown(gm: CapturedModule, plan: QuantPlan) -> None:
    known = node_names(gm)
    unknown = [name for name in plan if name not in known]
    if unknown:
        raise PassError(
            describe(
                f"the plan names {unknown[0]!r}, which the graph does not have in evaluation",
                got=f"{len(unknown)} such names",
                wanted="names of nodes of this graph, prepared for quantization",
                try_="the plan that Quantize().make_plan(graph.eval()) returns for this very graph",
            )
        )


def _in_evaluation(gm: CapturedModule) -> CapturedModule:
    copy = gm.clone()
    copy.eval()
    for module in copy.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.recompile()  # earlier steps of the pass changed the graph, and its code is of before
    return copy
