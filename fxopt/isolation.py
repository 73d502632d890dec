"""Run a model or graph so that nothing of the run is left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["isolated"]


@contextlib.contextmanager
def isolated(model: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """Run with a fixed random state and without gradients; undo what happens to buffers and the random state.

    The run sees copies of the buffers. So tensors that a graph shares with others are not even touched.
    """
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    copies = {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for held, before in kept:
            held.update({name: buffer if buffer is None else copies[id(buffer)] for name, buffer in before.items()})
        with torch.random.fork_rng(), torch.no_grad():
            _seed(seed)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for held, before in kept:
            held.update(before)


def _seed(seed: int) -> None:
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # which torch.manual_seed would put off to the first use of each kind, with a stack trace that takes longer
        torch.default_generator.manual_seed(seed)
