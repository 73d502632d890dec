"""One HTML file with everything in it: data, style, program and the library that lays graphs out."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

__all__ = ["SCRIPTS", "html_text"]

SCRIPTS = ("graph.js", "layout.js", "colours.js", "drawing.js", "details.js", "main.js")
"""Our own program, in the order in which it is read; each file uses what those before it define."""


def html_text(content: dict[str, Any]) -> str:
    """Return the page that shows what :func:`fxopt.tools.viz.document.document` returned."""
    folder = resources.files("fxopt.tools.viz")
    own = "\n".join(folder.joinpath("page", name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "TITLE": html.escape(content["title"]),
        "STYLE": folder.joinpath("page", "style.css").read_text(encoding="utf-8"),
        "LICENCE": folder.joinpath("vendor", "dagre", "LICENSE").read_text(encoding="utf-8"),
        "DAGRE": folder.joinpath("vendor", "dagre", "dagre.min.js").read_text(encoding="utf-8"),
        "PROGRAM": own,
        "DATA": json_for_script(content),
    }
    text, *pieces = folder.joinpath("page", "page.html").read_text(encoding="utf-8").split("{{")
    for piece in pieces:
        name, _, rest = piece.partition("}}")
        text += parts[name] + rest
    return text


def json_for_script(content: Any) -> str:
    """Return JSON that cannot end the script element it stands in, whatever the texts in it are."""
    plain = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return plain.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


__all__ += ["json_for_script"]
