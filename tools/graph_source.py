"""From the texts of the command line, a model and its example inputs, to a captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fxopt
from fxopt.errors import describe
from fxopt.input_spec import ExampleInputs, parse_axes, parse_inputs
from fxopt.tools.console import BadInputError, Stages, as_bad_input
from fxopt.tools.model_source import load_model

__all__ = ["captured"]

_EXAMPLE = '--inputs "f32[batch,3,224,224]", with its own sizes'


def captured(
    text: str, spec: str | None, dynamic: str | None, progress: Stages, *, train: bool
) -> fxopt.CapturedModule:
    """Return the graph of the model that ``text`` names, in the mode asked for.

    Args:
        text: The model, see :func:`fxopt.tools.model_source.load_model`.
        spec: The example inputs, see :mod:`fxopt.input_spec`; not needed where the model brings its own.
        dynamic: More dynamic axes of these inputs, see :func:`fxopt.input_spec.parse_axes`.
        progress: Told of each stage.
        train: Whether the graph is to be in train mode.

    Raises:
        BadInputError: there is no such model, or it and its inputs do not become a graph.
    """
    inputs = _inputs(spec, dynamic)
    progress.begin("load the model")
    model = load_model(text)
    progress.begin("capture")
    ready = isinstance(model, fxopt.CapturedModule | torch.export.ExportedProgram)
    with as_bad_input():
        gm = _finished(model, inputs, train=train) if ready else _fresh(text, model, inputs, train=train)
    if not gm.output_names:
        raise BadInputError(describe(f"{text} returns no tensor", got="None", wanted="at least one tensor or number"))
    return gm


def _inputs(spec: str | None, dynamic: str | None) -> ExampleInputs | None:
    with as_bad_input("--inputs"):
        inputs = None if spec is None else parse_inputs(spec)
    if dynamic is None:
        return inputs
    if inputs is None:
        raise BadInputError("--dynamic names axes of inputs, and --inputs is missing")
    with as_bad_input("--dynamic"):
        return parse_axes(dynamic, inputs)


def _fresh(text: str, model: Any, inputs: ExampleInputs | None, *, train: bool) -> fxopt.CapturedModule:
    """Capture a module or a function."""
    if inputs is None:
        raise BadInputError(describe("the model needs example inputs", try_=_EXAMPLE))
    is_module = isinstance(model, torch.nn.Module)
    if is_module:
        model.train(train)
    forward = model.forward if is_module else model
    _check_signature(forward, inputs)
    try:
        return fxopt.capture(model, list(inputs.samples), dynamic_shapes=inputs.dynamic_shapes(forward))
    except fxopt.CaptureError as error:
        if not is_module:
            raise BadInputError(
                f"{error}\n  note    {text} needs arguments, so it was taken for a model itself, not for what makes one"
            ) from error
        raise


def _check_signature(forward: Callable[..., Any], inputs: ExampleInputs) -> None:
    signature = inspect.signature(forward)
    for sample in inputs.samples:
        try:
            signature.bind(*sample.args, **sample.kwargs)
        except TypeError as error:
            asked = [item for item in signature.parameters.values() if item.default is item.empty]
            names = [item.name for item in asked if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
            raise BadInputError(
                describe(
                    f"--inputs: the inputs do not fit the model: {error}",
                    got=", ".join([f"{len(sample.args)} without a name", *sample.kwargs]),
                    wanted=f"{forward.__name__}{signature}",
                    try_=f'--inputs "{"; ".join(f"{name}=f32[...]" for name in names)}"' if names else None,
                )
            ) from None


def _finished(model: Any, inputs: ExampleInputs | None, *, train: bool) -> fxopt.CapturedModule:
    """Return the graph of a file, with other example inputs if given; its dynamic sizes are what they are."""
    gm = fxopt.capture(model, None if inputs is None else list(inputs.samples))
    if inputs is not None:
        _check_axes(gm, inputs)
        gm.samples = inputs.samples
    if not gm.samples:
        raise BadInputError(describe("the saved model brings no example inputs", try_=_EXAMPLE))
    if gm.training != train:
        gm.train(train)
    return gm


def _check_axes(gm: fxopt.CapturedModule, inputs: ExampleInputs) -> None:
    """Check the inputs against a finished graph.

    Raises:
        InputError: a sample does not fit the graph.
        BadInputError: a size that the inputs call dynamic is fixed in the graph.
    """
    first, *others = ([*gm.flatten_inputs(*sample.args, **sample.kwargs)] for sample in inputs.samples)
    del others  # it was enough that they fit
    structure = (inputs.samples[0].args, dict(inputs.samples[0].kwargs))
    axes_of = {id(leaf): axes for leaf, axes in _places(structure, (inputs.axes.args, dict(inputs.axes.kwargs)))}
    for spec, leaf in zip(gm.inputs, first, strict=True):
        for axis, dim in axes_of[id(leaf)].items() if spec.is_tensor else ():
            if isinstance(spec.shape[axis], int):
                raise BadInputError(
                    describe(
                        f"--inputs: axis {axis} of input {spec.name!r} is fixed in the saved model",
                        got=dim.__name__,
                        wanted=spec.shape[axis],
                    )
                )


def _places(value: Any, axes: Any) -> Iterator[tuple[Any, dict[int, Any]]]:
    """Yield each leaf of the inputs with its dynamic axes."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _places(item, axes[index] if isinstance(axes, tuple | list) else None)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, axes.get(key) if isinstance(axes, dict) else None)
    else:
        yield value, axes or {}
