"""What ``tests/bench/quantization.py`` quantizes: the trained nets of the zoo with real inputs, or random weights.

Calibration takes the first 64 inputs of the task; SQNR is measured on others. The score of ``tests/zoo/real.py`` runs
on its own rows: other digits for ``mobilenetv2``, a photograph for the face detector, and for ``mnist_cnn`` (5,000
digits) and ``crepe_tiny`` (240 tones) all rows, the 64 among them. The 32 sentences of ``minilm_l6`` are all scored, so
it is calibrated on 64 sentences of Python's own help texts.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import architectures, data, real, weights
from tests.zoo.real import Batch, Predict

SAMPLES = 64  # calibration samples of a trained net
RANDOM_SAMPLES = 8  # of a net with random weights, which is measured for latency and coverage only
HELD_OUT = 64  # inputs for SQNR

Main = Callable[[tuple[Tensor, ...], Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A net to quantize.

    Attributes:
        name: Its name in the table.
        model: The net in eval mode, f32.
        batches: Calibration inputs, one row each.
        example: Two rows, for capture.
        dynamic_shapes: As ``fxopt.capture`` takes them.
        held_out: Inputs for SQNR and, their first row, for latency.
        main: Takes all outputs and the inputs, returns what SQNR is measured of.
        score: Runs the task; None for random weights.
        metric: What ``score`` returns.
    """

    name: str
    model: nn.Module
    batches: list[Batch]
    example: Batch
    dynamic_shapes: dict[str, Any]
    held_out: Batch
    main: Main = lambda outputs, inputs: outputs[0]
    score: Callable[[Predict], float] | None = None
    metric: str = "random weights"

    def fixed(self) -> Subject:
        """Return the same with no free size, for a batch of one row."""
        return dataclasses.replace(self, example=rows(self.example, 0, 1), dynamic_shapes={})


def rows(inputs: Batch, start: int, stop: int) -> Batch:
    """Return some rows of a batch."""
    return tuple(tensor[start:stop] for tensor in inputs)


def single_rows(inputs: Batch) -> list[Batch]:
    """Return each row as a batch of its own."""
    return [rows(inputs, row, row + 1) for row in range(len(inputs[0]))]


def _trained(name: str, **changes: Any) -> Subject:
    """Return a net of ``real.REAL``, calibrated on its first inputs."""
    found = real.REAL[name]
    inputs = found.inputs(SAMPLES + HELD_OUT)
    defaults = {
        "batches": single_rows(rows(inputs, 0, SAMPLES)),
        "held_out": rows(inputs, SAMPLES, SAMPLES + HELD_OUT),
        "score": found.score,
        "metric": found.metric,
    }
    fields: dict[str, Any] = {**defaults, **changes}
    return Subject(name, found.load(), example=rows(inputs, 0, 2), dynamic_shapes=found.dynamic_shapes, **fields)


def _mobilenetv2() -> Subject:
    return _trained("mobilenetv2", held_out=(data.photos_of_digits(700 + HELD_OUT, 700),))


def _mtcnn_onet() -> Subject:
    """Return the last net of the face detector; the two before it stay in f32."""
    pnet, rnet = (real.eager(weights.mtcnn(name)) for name in ("PNet", "RNet"))
    return _trained("mtcnn_onet", score=functools.partial(real.cascade_iou, pnet, rnet), metric="IoU of the face found")


def _minilm_l6() -> Subject:
    held_out = data.tokens(len(data.SENTENCES))
    encoded = weights.minilm_tokenizer()(
        help_sentences(SAMPLES),
        padding="max_length",
        truncation=True,
        max_length=held_out[0].shape[1],  # one length for all, so that a tool without free sizes can be scored
        return_tensors="pt",
    )
    calibration = (encoded["input_ids"], encoded["attention_mask"])

    def words(outputs: tuple[Tensor, ...], inputs: Batch) -> Tensor:
        return outputs[0][inputs[1].bool()]  # what stands at the padding is read by nobody

    return _trained("minilm_l6", batches=single_rows(calibration), held_out=held_out, main=words)


def help_sentences(count: int) -> list[str]:
    """Return sentences of plain words from the help texts that come with Python."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}  # an ordered set: texts repeat each other
    for text in topics.values():
        sentences = re.split(r"(?<=\.)\s+", " ".join(text.split()))
        found |= dict.fromkeys(line for line in sentences if re.fullmatch(r"[A-Z][A-Za-z ,\-]{40,110}\.", line))
    return list(found)[:: max(1, len(found) // count)][:count]


TRAINED: dict[str, Callable[[], Subject]] = {
    "mobilenetv2": _mobilenetv2,
    "crepe_tiny": functools.partial(_trained, "crepe_tiny"),
    "minilm_l6": _minilm_l6,
    "mtcnn_onet": _mtcnn_onet,
    "mnist_cnn": functools.partial(_trained, "mnist_cnn"),
}

RANDOM_NAMES = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "vit_b_16",
    "bert",
)


def random_subject(name: str) -> Subject:
    """Return a net of ``tests/zoo/architectures.py`` in the size that people deploy."""
    torch.manual_seed(0)
    built = architectures.build(name, real=True, batch=RANDOM_SAMPLES + 2)
    inputs: Batch = (*built.args, *built.kwargs.values())
    calibration, held_out = rows(inputs, 0, RANDOM_SAMPLES), rows(inputs, RANDOM_SAMPLES, RANDOM_SAMPLES + 2)
    return Subject(name, built.model, single_rows(calibration), rows(inputs, 0, 2), built.dynamic_shapes, held_out)


def subject(name: str) -> Subject:
    """Return a net of ``TRAINED`` or ``RANDOM_NAMES``."""
    return TRAINED[name]() if name in TRAINED else random_subject(name)
