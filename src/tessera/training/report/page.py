"""From a Source to one HTML file that needs nothing else.

Text, figures and tables are written into the HTML by the template, so that they can be read without scripts and
printed; curves, heat map and the table of tensors are drawn by the page's script from JSON in a data block. Every
text from a run is hostile until escaped: the template escapes HTML, the data block escapes `<`, `>` and `&`. Behind
that stands a content security policy that allows this page's own script and style by their hashes and nothing
else, so the file cannot load or send anything anywhere.
"""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tessera.training.report import contents
from tessera.training.report.folder import Source

_SCRIPTS = ("format.js", "line_chart.js", "curves.js", "experts.js", "tensors.js", "page.js")


def render(source: Source) -> bytes:
    """The whole page, UTF-8."""
    style = _asset("vendor/uPlot.min.css") + _asset("style.css")
    script = _asset("vendor/uPlot.iife.min.js") + "\n(() => {\n" + "".join(map(_asset, _SCRIPTS)) + "})();\n"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("page.html"))
    html = template.render(
        contents.page(source),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        data=Markup(data_block(contents.data(source))),
        licence=Markup(_asset("vendor/uPlot.LICENSE.md").replace("--", "- -")),
    )
    # A sample may hold half a surrogate pair, which UTF-8 has no form for.
    return html.encode("utf-8", errors="replace")


def data_block(value: Any) -> str:
    """JSON that cannot end the script element it stands in; raises ValueError for NaN and infinities."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _policy(style: str, script: str) -> str:
    return f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
