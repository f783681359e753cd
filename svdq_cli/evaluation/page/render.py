"""From content to HTML. The page loads nothing: a content security policy forbids what is not in it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2

from svdq_cli.evaluation.page.content import Page

_HERE = Path(__file__).parent


def render_page(page: Page) -> str:
    """One self-contained HTML document. All text of `page` is escaped but its plots' SVG."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        page=page, script=script, script_hash=_csp_hash(script), style=style
    )


def _csp_hash(script: str) -> str:
    """What lets this script run and no other, however it came into the page (Content Security Policy 3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
