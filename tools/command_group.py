"""The group of all commands: every error, whatever its kind, becomes one message on stderr and an exit status."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from fxopt.errors import FxoptError, describe
from fxopt.tools.console import BadInputError, error_text, print_json, stderr

__all__ = ["Commands"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """Runs a command and reports its errors; ``--json`` among the arguments asks for them as JSON, too."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that ``args`` name and exit with its status; or return that, if not ``standalone_mode``."""
        given = sys.argv[1:] if args is None else list(args)
        try:
            status = super().main(given, prog_name, complete_var, False, windows_expand_args, **extra) or 0
            sys.stdout.flush()  # a full disk shows here, where it can be reported, and not while Python ends
        except Exception as error:
            status = _reported(error, as_json="--json" in given, debug="--debug" in given)
        if standalone_mode:
            sys.exit(status)
        return status


def _reported(error: Exception, *, as_json: bool, debug: bool) -> int:
    """Show an error and return the exit status that it stands for."""
    if type(error).__name__ == "NoArgsIsHelpError":  # just `fxopt`
        stderr().print(error.ctx.get_help(), markup=False)  # type: ignore[attr-defined]
        return USAGE
    status, message = _explained(error)
    if debug and not hasattr(error, "format_message"):
        traceback.print_exception(error)
    stderr().print(error_text(message), soft_wrap=True)
    if as_json:
        print_json({"ok": False, "status": status, "error": message})
    return status


def _explained(error: Exception) -> tuple[int, str]:
    if isinstance(error, typer.Abort):
        return INTERRUPTED, "interrupted"
    if hasattr(error, "format_message"):  # typer's own errors: an option or a command that there is not
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "fxopt"
        return USAGE, describe(error.format_message(), try_=f"{command} --help")
    message = str(error) + "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, BadInputError):
        return USAGE, message
    if isinstance(error, FxoptError | OSError):
        return FAILED, message
    headline = f"fxopt failed unexpectedly: {type(error).__name__}: {message}"
    return FAILED, describe(headline, try_="--debug, which shows where")
