"""A sentence BERT with weights of few bits: file size, error, ranking of sentences, and time in ONNX Runtime.

The net is MiniLM-L6 with its trained weights. SQNR is that of the worse output against ORT with float weights, on the
sentences of the score; "rank" is Spearman's correlation of all sentence similarities with those of the float net; time
is the median of one sentence, two threads. "kernels" counts the products that read blocks. GPTQ is calibrated on 300
sentences of Python's help texts.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

import fxopt
from fxopt.export import Session, to_onnx
from fxopt.passes import CodebookWeights, QuantizeWeights
from tests.bench.quantization_subjects import help_sentences
from tests.bench.zoo_table import write_row
from tests.zoo import data, weights
from tests.zoo.real import REAL

RUNS = 40
HEADER = ("weights", "MiB", "SQNR dB", "rank", "kernels", "ms")
LOW = {"min_sqnr_db": -20.0}
KINDS: dict[str, Sequence[fxopt.Pass]] = {
    "float": (),
    "8 bits": (QuantizeWeights(bits=8),),
    "8 bits, int8 activations": (QuantizeWeights(bits=8, accuracy_level=4),),
    "4 bits": (QuantizeWeights(),),
    "4 bits, symmetric": (QuantizeWeights(symmetric=True),),
    "4 bits, GPTQ": (QuantizeWeights(rounding="gptq"),),
    "4 bits, blocks of 128": (QuantizeWeights(block_size=128),),
    "4 bits, blocks of 128, GPTQ": (QuantizeWeights(block_size=128, rounding="gptq"),),
    "4 bits, int8 activations": (QuantizeWeights(accuracy_level=4),),
    "4 bits, embeddings 8": (QuantizeWeights(kinds=("linear",)), QuantizeWeights(bits=8)),
    "2 bits, blocks of 16, embeddings 8": (
        QuantizeWeights(bits=2, block_size=16, kinds=("linear",), **LOW),
        QuantizeWeights(bits=8, **LOW),
    ),
    "2 bits, blocks of 16, GPTQ, embeddings 8": (
        QuantizeWeights(bits=2, block_size=16, kinds=("linear",), rounding="gptq", **LOW),
        QuantizeWeights(bits=8, **LOW),
    ),
    "tables of 16": (CodebookWeights(**LOW),),
    "tables of 256": (CodebookWeights(bits=8),),
}
QUICK = ("float", "4 bits")


def main(console: Console, *, quick: bool = False) -> None:
    """Print the table."""
    model = REAL["minilm_l6"]
    gm = fxopt.optimize(model.load(), None, model.inputs(4), dynamic_shapes=model.dynamic_shapes, strict=True)
    sentences = model.inputs(len(data.SENTENCES))
    calibration = other_sentences(sentences[0].shape[1])
    write_row(console, HEADER)
    floats: tuple[Tensor, ...] = ()
    for name in QUICK if quick else KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rewritten = fxopt.optimize(gm, KINDS[name], calibration=calibration, strict=True, check="samples")
            file = to_onnx(rewritten, Path(folder) / "net.onnx", validate=False)
            assert file.path is not None
            session, size = Session(file.path, threads=2), file.path.stat().st_size / 2**20
        outputs = session.run(sentences)
        floats = floats or outputs
        rank = model.score(lambda *batch, session=session: session.run(batch))
        kernels = sum(node.op_type == "MatMulNBits" for node in file.model.graph)
        cells = (f"{size:.1f}", f"{noise(floats, outputs):.1f}", f"{rank:.4f}", str(kernels))
        write_row(console, (name, *cells, f"{milliseconds(session, model.inputs(1)):.1f}"))


def other_sentences(length: int) -> list[tuple[Tensor, ...]]:
    """Return batches of sentences of Python's help texts, for GPTQ."""
    encoded = weights.minilm_tokenizer()(
        help_sentences(300), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return list(zip(encoded["input_ids"].split(20), encoded["attention_mask"].split(20), strict=True))


def noise(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Return the signal to noise ratio of the worse output, in dB; inf if all are equal."""
    worst = math.inf
    for a, b in zip(want, got, strict=True):
        power = float((a.double() - b.double()).square().sum())
        worst = min(worst, 10 * math.log10(float(a.double().square().sum()) / power) if power else math.inf)
    return worst


def milliseconds(session: Session, inputs: Sequence[Tensor]) -> float:
    """Return the median time of a run."""
    times = []
    for _ in range(RUNS + 5):
        started = time.perf_counter()
        session.run(inputs)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[5:])
