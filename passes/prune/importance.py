"""How much each weight, or each channel, matters.

    l1, l2            magnitude: sum of |w|; root of the sum of w^2 (Han et al., NIPS 2015; Li et al., ICLR 2017)
    taylor            (sum of w dL/dw)^2: the change of the loss to first order (Molchanov et al., CVPR 2019)
    activation        how often a channel is above 0 behind its activation function (Hu et al., Network Trimming, 2016)
    batch-norm        |gain| of the channel's batch norms (Liu et al., Network Slimming, ICCV 2017)
    fpgm              distance from the other rows of the weight (He et al., FPGM, CVPR 2019)
    random            chance, with a seed

An own importance is a function that takes the graph and returns scores, f32 in the shape of the parameter, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from fxopt.attributes import get_path
from fxopt.calibration_data import calibration_samples
from fxopt.errors import CalibrationError, PassError, describe
from fxopt.graph_module import CapturedModule
from fxopt.isolation import isolated
from fxopt.passes.prune.activations import activation_frequencies
from fxopt.passes.prune.groups import Family
from fxopt.passes.prune.masks import masked_parts
from fxopt.passes.prune.structure import Structure

__all__ = ["KINDS", "Importance", "Loss", "Own", "group_scores", "weight_scores"]

Kind = Literal["l1", "l2", "taylor", "activation", "batch-norm", "fpgm", "random"]
KINDS: tuple[str, ...] = ("l1", "l2", "taylor", "activation", "batch-norm", "fpgm", "random")
Own = Callable[[CapturedModule], Mapping[str, torch.Tensor]]
Importance = str | Own
Loss = Callable[[Callable[..., Any], Any], torch.Tensor]


def weight_scores(
    gm: CapturedModule, importance: Importance, *, data: Iterable[Any], loss: Loss | None, seed: int
) -> dict[str, torch.Tensor]:
    """Return the importance of every single weight, f32 in the shape of its parameter, by first name; never negative.

    Args:
        gm: The graph; its gradients and buffers are left alone.
        importance: ``"l1"``, ``"l2"`` (here the square), ``"taylor"``, ``"random"``, or an own function.
        data: Inputs for ``"taylor"``.
        loss: For ``"taylor"``: takes the model and an item of the data, and returns a loss, a tensor without axes.
        seed: Of ``"random"``.

    Raises:
        PassError: the importance is one of channels alone, it is NaN, or an own one returns something else than scores.
    """
    terms = _terms(gm, importance, data, loss, seed)
    return {name: each.square() for name, each in terms.items()} if importance == "taylor" else terms


def group_scores(
    gm: CapturedModule,
    structure: Structure,
    families: Sequence[Family],
    importance: Importance,
    *,
    data: Iterable[Any],
    loss: Loss | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return the importance of the groups of each family, f32[groups], by name; higher is more important.

    Args: as :func:`weight_scores`, where ``importance`` may also be ``"activation"``, ``"batch-norm"`` or ``"fpgm"``,
    and ``"l2"`` is the root of the sum of squares. A family that has nothing to measure, such as no batch norm, is left
    out.

    Raises:
        PassError: a score is NaN.
        CalibrationError: the data are empty or do not fit.
    """
    if importance == "activation":
        return activation_frequencies(gm, structure, families, data)
    if importance == "fpgm":
        found = {family.name: rows for family in families if (rows := _distances(gm, family)) is not None}
        return _finite(found, importance)
    if importance == "batch-norm":
        gains = _gains(gm)
        return _finite(_sums(gm, families, gains), importance)
    sums = _sums(gm, families, _terms(gm, importance, data, loss, seed))
    if importance == "l2":
        return {name: each.sqrt() for name, each in sums.items()}
    return {name: each.square() for name, each in sums.items()} if importance == "taylor" else sums


def _terms(
    gm: CapturedModule, importance: Importance, data: Iterable[Any], loss: Loss | None, seed: int
) -> dict[str, torch.Tensor]:
    """Return what is summed over the weights of a group, f32 in the shape of each parameter, by its first name."""
    parameters = {name: p.detach() for name, p in gm.named_parameters() if p.is_floating_point()}
    found: dict[str, torch.Tensor]
    if callable(importance):
        found = _checked(gm, parameters, importance(gm))
    elif importance == "random":
        draw = torch.Generator().manual_seed(seed)
        found = {name: torch.rand(p.shape, generator=draw) for name, p in parameters.items()}
    elif importance == "taylor":
        gradients = _gradients(gm, data, loss)
        found = {name: (p * gradients[name]).float() for name, p in parameters.items() if name in gradients}
    elif importance in ("l1", "l2"):
        found = {name: p.float().abs() if importance == "l1" else p.float().square() for name, p in parameters.items()}
    else:
        raise PassError(
            f"importance {importance!r} is one of channels; for single weights there are l1, l2, taylor and random"
        )
    return _finite(found, importance)


def _finite(scores: dict[str, torch.Tensor], importance: Importance) -> dict[str, torch.Tensor]:
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise PassError(
                describe(
                    f"the importance {importance!r} of {name!r} is NaN",
                    got=f"{int(score.isnan().sum())} of {score.numel()} scores",
                    try_="weights, data and a loss without NaN and infinities",
                )
            )
    return scores


def _sums(
    gm: CapturedModule, families: Iterable[Family], scores: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the sum of the scores of all weights of each group, f32[groups], by name of the family.

    A tied parameter may be read under another name than it is scored under. A family without scores is left out.
    """
    by_tensor = {id(get_path(gm, name)): score for name, score in scores.items()}
    found: dict[str, torch.Tensor] = {}
    for family in families:
        sums = torch.zeros(len(family.groups))
        scored = False
        for at, (name, dim) in enumerate(family.axes):
            score = by_tensor.get(id(get_path(gm, name)))
            if score is not None:
                scored = True
                rows = score.movedim(dim, 0).reshape(score.shape[dim], -1).sum(dim=1)
                sums += rows.cpu()[torch.tensor([group.parts[at].places for group in family.groups])].sum(dim=1)
        if scored:
            found[family.name] = sums
    return found


def _distances(gm: CapturedModule, family: Family) -> torch.Tensor | None:
    """Return the sum of the distances of each group's rows from those of the others, f32[groups]."""
    name, dim = family.axes[0]
    weight = get_path(gm, name).detach()
    if weight.ndim < 2:
        return None
    places = torch.tensor([group.parts[0].places for group in family.groups])
    rows = weight.movedim(dim, 0).flatten(1).float().cpu()[places].flatten(1)
    # By differences: products of long rows, which cdist takes otherwise, lose those of rows that are close.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)


def _gains(gm: CapturedModule) -> dict[str, torch.Tensor]:
    """Return the magnitude of the gains of batch norms, f32, by name of the parameter."""
    found: dict[str, torch.Tensor] = {}
    for node in gm.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default or not isinstance(node.args[1], torch.fx.Node):
            continue
        parts = masked_parts(node.args[1])
        gain = node.args[1] if parts is None else parts[0]
        if gain.op == "get_attr":
            found[str(gain.target)] = get_path(gm, str(gain.target)).detach().abs().float()
    return found


def _gradients(gm: CapturedModule, data: Any, loss: Loss | None) -> dict[str, torch.Tensor]:
    """Return the mean gradient of the loss by parameter; without a loss, that of the mean square of all outputs."""
    parameters = {name: p for name, p in gm.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    with isolated(gm), torch.enable_grad():
        for item in _items(data) if loss is not None else calibration_samples(gm, data):
            reached = loss(gm, item) if loss is not None else _mean_square(gm, item)
            if not isinstance(reached, torch.Tensor) or reached.numel() != 1 or not reached.requires_grad:
                raise PassError(
                    describe(
                        "the loss for the importance 'taylor' is no number with a gradient",
                        got=repr(reached)[:80],
                        wanted="a tensor of one element that depends on the parameters",
                        try_="loss=lambda model, item: cross_entropy(model(item[0]), item[1])",
                    )
                )
            found = torch.autograd.grad(reached.reshape(()), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient
            count += 1
    if count == 0:
        raise CalibrationError(
            "the data for the importance 'taylor' are empty, or used up: pass a list or a DataLoader"
        )
    return {name: total / count for name, total in sums.items()}


def _items(data: Any) -> Iterable[Any]:
    found: Iterable[Any] = data if hasattr(data, "__iter__") or not callable(data) else data()
    return found


def _mean_square(gm: CapturedModule, sample: Any) -> torch.Tensor:
    outputs = gm.flat_outputs(*sample.args, **sample.kwargs)
    floats = [y.float() for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]
    if not floats:
        raise PassError("the model returns no floating-point numbers: the importance 'taylor' needs a loss=")
    return torch.stack([y.square().mean() for y in floats]).sum()


def _checked(gm: CapturedModule, parameters: Mapping[str, torch.Tensor], found: Any) -> dict[str, torch.Tensor]:
    if not isinstance(found, Mapping):
        raise PassError(f"the own importance returned a {type(found).__name__}; wanted scores by name of the parameter")
    first = {id(parameter): name for name, parameter in gm.named_parameters()}
    every = dict(gm.named_parameters(remove_duplicate=False))
    scores: dict[str, torch.Tensor] = {}
    for name, each in found.items():
        if name not in every:
            raise PassError(
                describe(
                    f"the own importance scores {name!r}, and the graph has no such parameter",
                    wanted=", ".join(list(every)[:8]),
                )
            )
        if not isinstance(each, torch.Tensor) or each.shape != every[name].shape:
            raise PassError(
                describe(
                    f"the own importance scores {name!r} in another shape than that of the parameter",
                    got=tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__,
                    wanted=tuple(every[name].shape),
                )
            )
        if (canonical := first[id(every[name])]) in parameters:
            scores[canonical] = each.detach().float()
    return scores
