"""Load and run one file, and print by how many bytes that raised the peak memory of this process.

python -m fxopt.export.bench_memory FILE.onnx INPUTS.pt THREADS
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from fxopt.export.session import Session

__all__ = ["fresh_peak_bytes", "main", "peak_bytes"]

_RUNS = 3


def main(path: str, inputs: str, threads: str) -> None:
    """Write the number to standard output."""
    given = torch.load(inputs)
    before = fresh_peak_bytes()
    session = Session(path, threads=int(threads) or None)
    for _ in range(_RUNS):
        session.run(given)
    sys.stdout.write(f"{peak_bytes() - before}\n")


def fresh_peak_bytes() -> int:
    """Forget the peak so far, where the system can (Linux alone), and return it as it stands then."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the peak of resident memory.

    Linux's ``ru_maxrss`` may be that of the process which started this one, so its table of the process goes first.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main(*sys.argv[1:])
