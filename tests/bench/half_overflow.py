"""Small nets that float16 breaks, each cast by fxopt and by peers: who misses it, and what ORT on a CPU shows of it.

Signal to noise of the files against eager float32, in dB: in emulation, where every operator is rounded as on a device
with half precision, and as ORT runs them on a CPU, where a wrong file looks right. "wrong" is less than 20 dB.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fxopt
from fxopt import numerics
from fxopt.export import Session, to_onnx
from fxopt.passes import CastHalf
from tests.bench.half_precision import converted, half_session
from tests.bench.zoo_table import write_row
from tests.models.half_corpus import CORPUS, Case

PEERS = ("onnxconverter-common", "ORT transformers.float16")
HEADER = ("net", "fxopt dB", "float32 nodes and lines", *(f"{peer} dB (as ORT's CPU shows it)" for peer in PEERS))
WRONG_DB, GOAL_DB = 20.0, 35.0


def shown(found: float) -> str:
    """Return a signal to noise for people."""
    return f"{found:.0f}" + (" wrong" if found < WRONG_DB else "")


def sqnr_db(session: Session, inputs: tuple[torch.Tensor, ...], precise: tuple[Any, ...]) -> float:
    """Return the worst signal to noise of all outputs."""
    return min(
        numerics.measure(want, got).sqnr_db for want, got in zip(precise, session.run(list(inputs)), strict=True)
    )


def row(case: Case, folder: Path) -> tuple[str, ...]:
    """Return one row of the table."""
    torch.manual_seed(0)
    inputs = case.inputs()
    gm = fxopt.capture(case.model().eval(), inputs, dynamic_shapes=case.dynamic)
    precise = gm.flat_outputs(*inputs)
    cast = CastHalf("float16", min_sqnr_db=GOAL_DB, accumulate=case.accumulate)
    plan = cast.make_plan(gm)
    half = fxopt.optimize(gm, [cast])
    file = folder / "fxopt.onnx"
    to_onnx(half, file, runtime="onnx", validate=False)
    reasons = "; ".join(dict.fromkeys(plan.reasons.values())).replace("|", "/")
    cells = [case.name, shown(sqnr_db(half_session(file), inputs, precise)), reasons[:160]]
    plain = folder / "float32.onnx"
    to_onnx(gm, plain, validate=False)
    for peer in PEERS:
        if peer == PEERS[0] and importlib.util.find_spec("onnxconverter_common") is None:
            cells.append("")
            continue
        path = folder / f"{peer.replace(' ', '_')}.onnx"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that are clamped
                converted(peer, plain, path)
            found, hidden = (sqnr_db(make(path), inputs, precise) for make in (half_session, Session))
            cells.append(f"{shown(found)} ({hidden:.0f})")
        except Exception as error:  # whatever a peer raises, or ORT says of its file, is its result
            cells.append(f"FAILS: {' '.join(str(error).split())[:80]}".replace("|", "/"))
    return tuple(cells)


def main(console: Console | None = None, *, quick: bool = False, **unused: Any) -> None:
    """Print the table row by row, as Markdown."""
    console = console or Console()
    write_row(console, HEADER)
    write_row(console, ("---",) * len(HEADER))
    for case in CORPUS:
        with tempfile.TemporaryDirectory() as folder:
            write_row(console, row(case, Path(folder)))
