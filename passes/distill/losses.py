"""The losses of distillation, as functions of tensors.

All are means, so that their scale does not depend on the batch; values in half precision are compared in float32.
``teacher`` is a target: no gradient flows into it where the graph stops it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.normalization_ops import widened

__all__ = ["attention_loss", "hint_loss", "response_loss", "similarity_loss", "standardized"]

_TINY = 1e-7  # as in the code of Sun et al.; logits that are all equal stay 0


def response_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    standardize: bool = False,
    class_axis: int = 1,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return ``(1 - a) CE(y, softmax(z)) + a T^2 KL(softmax(z' / T) || softmax(z / T))``, the mean of all positions.

    Args:
        student: Logits z, [batch, classes, ...] or [batch, ..., classes].
        teacher: Logits z' of the same shape.
        labels: Class indices i64 in the shape of the logits without classes, or probabilities in their shape. Without
            labels the result is ``T^2 KL(...)``, whatever ``alpha`` is.
        temperature: T > 0.
        alpha: a in [0, 1].
        standardize: Compare the logits less their mean, over their standard deviation; CE is of the plain ones.
        class_axis: Axis of the classes.
        ignore_index: Positions with this class index count in neither term; if all have it, the result is NaN, as
            that of ``torch.nn.functional.cross_entropy``.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2; standardization:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, algorithm 1.
    """
    student, teacher = widened(student), widened(teacher)
    compared = (
        (standardized(student, class_axis), standardized(teacher, class_axis)) if standardize else (student, teacher)
    )
    log_q, log_p = (F.log_softmax(logits / temperature, class_axis) for logits in compared)
    p = log_p.exp()
    # A class that the teacher excludes adds 0, as the limit of p log p is, and not 0 times infinity.
    divergence = torch.where(p > 0, p * (log_p - log_q), 0).sum(class_axis)
    if labels is None:
        return temperature**2 * divergence.mean()
    if labels.is_floating_point():
        hard = -(labels * F.log_softmax(student, class_axis)).sum(class_axis).mean()
        soft = divergence.mean()
    else:
        counted = labels != ignore_index
        logits = student if class_axis == 1 else student.movedim(class_axis, 1)
        hard = F.cross_entropy(logits, labels, ignore_index=ignore_index)
        soft = torch.where(counted, divergence, 0).sum() / counted.sum()
    return (1 - alpha) * hard + alpha * temperature**2 * soft


def standardized(logits: torch.Tensor, class_axis: int) -> torch.Tensor:
    """Return logits less their mean, over their standard deviation (of the population) plus 1e-7."""
    centred = logits - logits.mean(class_axis, keepdim=True)
    return centred / (logits.std(class_axis, correction=0, keepdim=True) + _TINY)


def hint_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of two values of one shape.

    Source: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation 3, with the mean instead of half the
        sum, so that weights do not depend on sizes.
    """
    return F.mse_loss(widened(student), widened(teacher))


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, *, channel_axis: int = 1) -> torch.Tensor:
    """Return the mean squared difference of two normalized attention maps.

    A map is ``Q = sum over channels of value^2``, flattened for each element of the batch, over its L2 norm.

    Args:
        student: [batch, channels, ...].
        teacher: The same sizes but for the channels.
        channel_axis: Axis of the channels.

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, equation 2, for p = 2, with the
        mean over the batch and the positions, as in the authors' code.
    """
    ours, theirs = (F.normalize(widened(value).square().sum(channel_axis).flatten(1)) for value in (student, teacher))
    return F.mse_loss(ours, theirs)


def similarity_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return ``|G' - G|^2 / b^2`` of the similarities of the examples of a batch.

    ``G`` are the dot products of the flattened values of all pairs of the b examples, each row over its L2 norm.

    Args:
        student: [batch, ...].
        teacher: [batch, ...], of any other sizes.

    Source: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, equations 1 to 4.
    """
    rows = [widened(value).flatten(1) for value in (student, teacher)]
    ours, theirs = (F.normalize(row @ row.t()) for row in rows)
    return F.mse_loss(ours, theirs)
