"""The page at ``/``: one HTML file without anything from elsewhere, which the browser is told to refuse."""

import base64
import functools
import hashlib
import html
import importlib.resources
import re


def _inline_hash(name: str) -> str:
    content = re.search(rf"<{name}>(.*?)</{name}>", _source(), re.DOTALL)[1]
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


@functools.cache
def _source() -> str:
    return (importlib.resources.files("roberta_fast.serving") / "page.html").read_text(encoding="utf-8")


def rendered(task: str, model: str) -> str:
    """The page for a task."""
    return _source().replace("{{task}}", html.escape(task)).replace("{{model}}", html.escape(model))


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{_inline_hash('script')}'; "
        f"style-src 'sha256-{_inline_hash('style')}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
