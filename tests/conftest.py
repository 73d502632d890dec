"""What every test gets: a seed, hypothesis without a clock, few collections of cycles, warnings as errors."""

import gc
import os

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test asks a hub for anything

# FXOPT_EXPLORE=1 draws new hypothesis examples on each run; without it a failure repeats by itself.
hypothesis.settings.register_profile("fxopt", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("explore" if os.environ.get("FXOPT_EXPLORE") else "fxopt")


class _TorchRandom:
    """torch's generator in the form that hypothesis seeds before each example, so that a failing one repeats."""

    seed = staticmethod(torch.default_generator.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_TORCH_RANDOM)

THIRD_PARTY_WARNINGS = (
    # torch's slow path for an even kernel with padding="same": true, and nothing a graph can change
    "ignore:Using padding='same' with even kernel lengths:UserWarning",
    # Lightning 2.6 makes tree specs in a way that torch 2.14 wants to drop
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Add the exceptions to ``filterwarnings = error`` of pyproject.toml."""
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so do the programs that they start


def pytest_collection_finish() -> None:
    """Let the collector of cycles pass over what imports have made, half a million objects that stay until the end.

    Otherwise a tenth of all test time goes into looking at them again, each time that a graph has been made.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Give the tensors that a module makes when it is imported the same values in every run."""
    if isinstance(collector, pytest.Module):
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.default_generator.manual_seed(0)
