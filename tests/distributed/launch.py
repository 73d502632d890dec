"""Start a program of this folder in two processes, as a user does: with torchrun."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import filelock
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SECONDS = 120


def torchrun(*program: str, folder: pathlib.Path, processes: int = 2) -> str:
    """Run ``program``, ``-m module arguments`` or ``file arguments``, in processes that meet on a free port.

    Args:
        program: What to run.
        folder: The working directory.
        processes: How many.

    Returns:
        What they printed.

    Raises:
        AssertionError: one of them failed, or they took too long; with all that they printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = subprocess.Popen(
        [*command, *program],
        cwd=folder,
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = started.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        started.terminate()  # torchrun ends its processes
        said, _ = started.communicate()
        raise AssertionError(f"{' '.join(program)} did not end within {SECONDS} s:\n{said}") from None
    assert started.returncode == 0, f"{' '.join(program)} ended with status {started.returncode}:\n{said}"
    return said


def trained_once(module: str, temporary: pytest.TempPathFactory) -> pathlib.Path:
    """Return the folder that ``module``, a program of this package, has written to in two processes.

    It runs once, also where several processes of pytest want what it writes: the others wait.
    """
    base = temporary.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / module
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()  # a run that failed has made it, and fails for the others, too
            torchrun("-m", f"tests.distributed.{module}", str(folder), folder=folder)
            (folder / "done").touch()
    return folder
