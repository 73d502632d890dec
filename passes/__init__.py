"""fxopt.passes: the passes, one file each, one folder for each capability."""

from fxopt.pass_base import Pass

__all__ = ["DEFAULT", "PASSES"]

PASSES: tuple[type[Pass], ...] = ()
DEFAULT: tuple[Pass, ...] = ()
