"""What a pass is: a frozen dataclass with a name, a contract, options as fields, and ``run(rw)``."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_base import PassResult as TorchPassResult

from fxopt.changes import Change, Skip
from fxopt.contracts import Contract
from fxopt.errors import FixedPointError, describe
from fxopt.graph_module import CapturedModule
from fxopt.interface import Interface
from fxopt.rewriter import Rewriter

__all__ = ["FixedPoint", "LossyPass", "Pass", "PassResult", "run_passes"]


class PassResult(TorchPassResult):
    """What a pass did.

    Attributes:
        graph_module, modified: As torch's own PassResult has them; ``modified`` is ``bool(changes)``.
        changes: Every change, in order.
        skips: Every refusal, with its reason.
        notes: What else the pass reports.
    """

    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    notes: tuple[str, ...]

    def __new__(
        cls, gm: CapturedModule, changes: Collection[Change], skips: Collection[Skip], notes: Collection[str] = ()
    ) -> PassResult:
        """Return the result of a pass that made these changes and refusals."""
        self = cast("PassResult", super().__new__(cls, gm, bool(changes)))
        self.changes, self.skips, self.notes = tuple(changes), tuple(skips), tuple(notes)
        return self

    @property
    def gm(self) -> CapturedModule:
        """The graph after the pass."""
        return self.graph_module  # type: ignore[no-any-return]  # torch declares no type


@dataclasses.dataclass(frozen=True)
class Pass(PassBase):
    """One rewrite of a graph. Subclass it as a frozen dataclass whose fields are the options.

    Class attributes:
        name: The name on the command line, in kebab-case.
        contract: What the pass promises about the numbers.
        needs: Facts about the graph that must hold before, such as ``"no-qdq"``. A fact that starts with ``no-`` holds
            until a pass ends it; any other one holds from when a pass gives it.
        gives, ends: Facts that hold, or no longer hold, after the pass.
        evaluation_only: The promise is about evaluation; while training, the rewritten graph may do something else.
        remedy: What a user can try if it breaks its contract; empty for nothing in particular.
        divisible: If it breaks its contract, the guilty sites can be left out one by one; if not, all of it is undone.
        interface: What the pass does to inputs and outputs: they are ``"kept"``; ``"extended"`` by arguments, and by
            outputs behind those that there were; ``"reduced"`` to the first outputs; or ``"retyped"``, with floats of
            another type. The promise is about the outputs that there are before and after.

    A pass has no state: whatever it learns of the graph stays inside ``run``.
    """

    name: ClassVar[str] = ""
    contract: ClassVar[Contract] = Contract.EXACT
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    ends: ClassVar[frozenset[str]] = frozenset()
    evaluation_only: ClassVar[bool] = False
    remedy: ClassVar[str] = ""
    divisible: ClassVar[bool] = True
    interface: ClassVar[Interface] = "kept"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name and not all(word.isalnum() and word == word.lower() for word in cls.name.split("-")):
            raise TypeError(f"pass name {cls.name!r} is not kebab-case, like 'fold-batch-norm'")

    @abstractmethod
    def run(self, rw: Rewriter) -> None:
        """Change the graph through ``rw``, and through nothing else."""

    def __call__(self, graph_module: torch.fx.GraphModule, *, only: Collection[str] | None = None) -> PassResult:
        """Run on a copy of the graph, which is left alone, without checking the result.

        Args:
            graph_module: A captured graph.
            only: Names of the sites to work at; all if None.

        Raises:
            TypeError: the graph was not made by :func:`fxopt.capture`.
        """
        if not isinstance(graph_module, CapturedModule):
            raise TypeError(
                f"{self.name or type(self).__name__} works on a captured graph "
                f"and got a {type(graph_module).__name__}; call fxopt.capture(model, example_inputs) first"
            )
        rw = Rewriter(graph_module.clone(), self.name, only=only)
        self.run(rw)
        rw.finish()
        return PassResult(rw.gm, rw.changes, rw.skips, rw.notes)

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        """Do what calling the pass does; this is where torch's own PassManager looks."""
        return self(graph_module)

    def spec(self) -> str:
        """Return the text that makes this pass again: its name, and the options that are not the default."""
        options = []
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if not field.repr:  # what no text can make again
                if given not in (None, field.default):
                    options.append(f"{field.name}=...")
            elif given != field.default:
                options.append(
                    f"{field.name}={'|'.join(map(str, given)) if isinstance(given, tuple | frozenset) else given}"
                )
        return self.name + (f"{{{','.join(options)}}}" if options else "")


class LossyPass(Pass):
    """A pass that computes another function on purpose, with ``min_sqnr_db`` among its options.

    That is the signal to noise that every output must keep on the example inputs, in dB.
    """

    if TYPE_CHECKING:

        @property
        def min_sqnr_db(self) -> float:
            """The option, a field of the pass."""

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # an option here, a constant in other passes
        """The promise about the outputs."""
        return Contract.lossy("sqnr_db", self.min_sqnr_db)


def run_passes(rw: Rewriter, passes: Iterable[Pass]) -> None:
    """Run passes as parts of another one; what each changes and refuses is recorded under its own name."""
    name = rw.pass_name
    for item in passes:
        rw.pass_name = item.name
        item.run(rw)
    rw.pass_name = name


@dataclasses.dataclass(frozen=True)
class FixedPoint(Pass):
    """Repeat passes, in order, until none of them changes anything.

    Attributes:
        passes: The passes.
        cap: Number of rounds after which they are taken to undo each other.
    """

    name: ClassVar[str] = "fixed-point"
    passes: tuple[Pass, ...] = ()
    cap: int = 20

    @property
    def contract(self) -> Contract:  # type: ignore[override]  # computed here, a constant in other passes
        """The contract of all passes together."""
        joined = Contract.EXACT
        for item in self.passes:
            joined = joined.then(item.contract)
        return joined

    @property
    def evaluation_only(self) -> bool:  # type: ignore[override]  # computed here, a constant in other passes
        """Whether the promise of any of the passes is about evaluation."""
        return any(item.evaluation_only for item in self.passes)

    def run(self, rw: Rewriter) -> None:
        """Run the rounds.

        Raises:
            FixedPointError: after ``cap`` rounds there are still changes; the message names the passes that made them.
        """
        changed: list[Change] = []
        for _ in range(self.cap):
            kept_skips, before = len(rw.skips), len(rw.changes)
            run_passes(rw, self.passes)
            changed = rw.changes[before:]
            if not changed:
                return
            del rw.skips[kept_skips:]
        nodes = sorted({change.node for change in changed})
        raise FixedPointError(
            describe(
                f"{' and '.join(dict.fromkeys(c.pass_name for c in changed))} "
                f"still change the graph after {self.cap} rounds",
                got="; ".join(f"{change.pass_name} at {change.node}: {change.why}" for change in changed[:4]),
                wanted="a round without changes",
                try_=f"two rules that do not undo each other at {', '.join(nodes[:4])}",
            )
        )
