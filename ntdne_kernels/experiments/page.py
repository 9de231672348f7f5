"""Renders the templates in templates/: pages of HTML, which need no other file, and Markdown."""

import html
from functools import cache
from typing import Any

import jinja2


def render(template: str, content: dict[str, Any]) -> str:
    """The text of a template filled with the content; in templates of HTML the content is escaped."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": lambda count: f"{count:,}",
        "percent": _percent,
        "share": _share,
        "markdown_text": _markdown_text,
    }
    return environment


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.1f} %"


def _share(value: float) -> str:
    if value != value:  # NaN: not known
        return "–"
    return "< 0.001" if 0 < value < 0.0005 else f"{value:.3f}"


def _markdown_text(cell: str) -> str:
    """Text for a cell of a Markdown table."""
    return html.escape(cell, quote=False).replace("|", r"\|")
