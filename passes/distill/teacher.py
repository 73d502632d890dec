"""Make a teacher ready to be merged: one graph of evaluation, frozen, for the inputs of the student."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from fxopt.attributes import get_path, named_tensors
from fxopt.capture import capture, switched
from fxopt.dimensions import Sample, bind_arguments
from fxopt.errors import PassError, describe
from fxopt.freeze import frozen
from fxopt.function_module import as_module
from fxopt.graph_module import CapturedModule, InputSpec, graph_modules
from fxopt.manager import PassManager
from fxopt.passes.cleanup.memory import Memory

__all__ = ["frozen_teacher", "matching_inputs", "refuse_shared_tensors"]


def frozen_teacher(
    teacher: Any, student: CapturedModule, *, half: torch.dtype | None = None, passes: Iterable[Any] = ()
) -> CapturedModule:
    """Return the teacher as a graph that is valid in evaluation alone and whose parameters want no gradient.

    Parameters and buffers share their memory with the teacher's, so that a teacher that moves on its own is followed.

    Args:
        teacher: A module or a function, which is captured on the student's samples; or a captured graph.
        student: The student.
        half: Element type that a module's parameters and inputs are cast to, on a copy.
        passes: What to run over the graph of the teacher.

    Raises:
        PassError: a graph is to be cast, or a pass fails.
        CaptureError: the teacher cannot become a graph.
    """
    if isinstance(teacher, CapturedModule):
        if half is not None:
            raise PassError(
                describe(
                    f"half={half} casts a module, and the teacher is a captured graph already",
                    try_="the module itself, or teacher_passes=[...] with a pass that lowers the precision of a graph",
                )
            )
        graph = teacher.clone()
    else:
        graph = _captured(as_module(teacher), student, half)
    graph.eval()
    graph = PassManager(passes, strict=True).run(graph)
    graph = frozen(graph)
    _freeze_parameters(graph)
    return graph


def _captured(module: torch.nn.Module, student: CapturedModule, half: torch.dtype | None) -> CapturedModule:
    samples = list(student.samples)
    if half is not None:
        module = copy.deepcopy(module).to(half)
        samples = [sample.map(lambda leaf: _cast(leaf, half)) for sample in samples]
    with switched(module, False):
        return capture(module, samples, dynamic_shapes=_dynamic_shapes(module, student), modes="current")


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _dynamic_shapes(module: torch.nn.Module, student: CapturedModule) -> dict[str, Any] | None:
    """Return the dynamic sizes of the student's inputs by the names that the teacher has for them."""
    if not student.dims:
        return None

    def dimension(size: str) -> Any:
        return str(student.dims[size]) if size in student.dims else torch.export.Dim.AUTO

    axes = [
        {axis: dimension(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)} or None
        for spec in student.inputs
    ]
    sample = student.samples[0]
    found: Sample = sample.with_leaves(axes)
    return bind_arguments(module.forward, found)


def _freeze_parameters(gm: CapturedModule) -> None:
    """Let the graph hold parameters of its own, in the same memory, that want no gradient."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = torch.nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), new)


def refuse_shared_tensors(student: CapturedModule, teacher: CapturedModule) -> None:
    """Check that training the student leaves the teacher alone.

    Raises:
        PassError: a parameter of the student, or a buffer that it writes, lies in memory of the teacher.
    """
    theirs = {_place(tensor): name for name, tensor in named_tensors(teacher) if tensor.numel()}
    written = _written(student)
    for name, tensor in named_tensors(student):
        moves = isinstance(tensor, torch.nn.Parameter) or _place(tensor) in written
        if moves and tensor.numel() and _place(tensor) in theirs:
            raise PassError(
                describe(
                    "student and teacher share tensors, so that training one would change the other",
                    got=f"{name!r} of the student is {theirs[_place(tensor)]!r} of the teacher",
                    try_="a student of its own: copy.deepcopy(model), or passes.distilled_student(model, ...)",
                )
            )


def _written(gm: CapturedModule) -> set[int]:
    """Return where the buffers lie that the graph writes."""
    found = set()
    for module in graph_modules(gm):
        memory = Memory(module)
        for node in module.graph.nodes:
            if node.op == "get_attr" and memory.is_written(node):
                tensor = get_path(module, str(node.target))
                found |= {_place(tensor)} if isinstance(tensor, torch.Tensor) else set()
    return found


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def matching_inputs(teacher: CapturedModule, student: CapturedModule) -> dict[str, str]:
    """Return the student's input for each input of the teacher: by name if all names are the student's, else in order.

    Raises:
        PassError: the inputs differ in number, rank or kind of element.
    """
    theirs = [spec for spec in teacher.inputs if spec.is_tensor]
    ours = {spec.name: spec for spec in student.inputs if spec.is_tensor}
    by_name = all(spec.name in ours for spec in theirs)
    names = [spec.name for spec in theirs] if by_name else list(ours)
    fits = len(names) == len(theirs) and all(
        len(spec.shape) == len(ours[name].shape) and _is_floating(spec) == _is_floating(ours[name])
        for spec, name in zip(theirs, names, strict=True)
    )
    if not fits:
        raise PassError(
            describe(
                "student and teacher take different inputs",
                got=f"teacher {', '.join(map(str, theirs)) or '(none)'}",
                wanted=f"student {', '.join(map(str, ours.values())) or '(none)'}",
                try_="a teacher of the same inputs, by the same names or in the same order",
            )
        )
    return {spec.name: name for spec, name in zip(theirs, names, strict=True)}


def _is_floating(spec: InputSpec) -> bool:
    return spec.dtype is not None and spec.dtype.is_floating_point
