"""Run a program in several processes, as a user does: with torchrun; or a function of a test."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import filelock
import pytest
import torch

Work = Callable[[int, int, pathlib.Path], None]
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


def run_in_processes(work: Work, processes: int, folder: pathlib.Path) -> None:
    """Run ``work(rank, processes, folder)`` in processes that are one group of ``torch.distributed``.

    A function of a module: each process imports it. They come from one process that has fxopt loaded, and what torch
    loads to capture: that takes longer than what most of them are to do.
    """
    multiprocessing.set_forkserver_preload(["fxopt.passes", "fxopt.export", "torch._dynamo"])
    torch.multiprocessing.start_processes(_joined, (work, processes, folder), processes, start_method="forkserver")


def _joined(rank: int, work: Work, processes: int, folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        work(rank, processes, folder)
        torch.distributed.barrier()  # one that ended would break the sums of those that go on
    finally:
        torch.distributed.destroy_process_group()


def trained_once(work: Work, temporary: pytest.TempPathFactory) -> pathlib.Path:
    """Return the folder that ``work``, a function of this package, has written to in two processes.

    It runs once, also where several processes of pytest want what it writes: the others wait.
    """
    base = temporary.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / work.__module__
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()  # a run that failed has made it, and fails for the others, too
            run_in_processes(work, 2, folder)
            (folder / "done").touch()
    return folder
