"""A page: one HTML file that needs no network, made of a Jinja2 template with autoescape and of our own assets."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from openclip_otco.files import write_text

_ASSETS = files("openclip_otco.pages").joinpath("assets")


def write_page(path: Path, name: str, **parts: Any) -> None:
    """Write the page `name` (`gallery`, `inspect`) to `path`; a reader, or a kill half-way, meets the old or the new.

    Args:
        path: its folder is made where it is missing.
        name: the template, and its style sheet and script beside those that all pages share.
        parts: what the template shows; text is escaped, whoever wrote it.

    Raises:
        OSError: `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Captions may hold lone surrogates, which JSON can spell and UTF-8 cannot.
    write_text(path, render(name, **parts).encode("utf-8", "replace").decode())


def render(name: str, **parts: Any) -> str:
    """The page `name` as text; see `write_page`.

    Its content security policy admits the page's own style sheet and script, by their hashes, and pictures out of the
    page: a script that got in through a caption in spite of the escaping would not run.
    """
    style, script = (_joined(name, kind) for kind in ("css", "js"))
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return (
        _environment()
        .get_template(f"{name}.html")
        .render(
            **parts,
            style=Markup(style),  # ours, and free of `</`
            script=Markup(script),
            policy="; ".join(f"{directive} {sources}" for directive, sources in policy.items()),
        )
    )


def jpeg_uri(picture: bytes) -> str:
    """A JPEG file as an address that needs no file."""
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def number(value: Any) -> str:
    """A number for reading: whole ones with thousands parted, others to four digits; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def percent(share: float) -> str:
    """A share as per cent, to two digits and not below 0.1 %; no more than the estimates are worth."""
    if 0 < share < 0.001:
        return "less than 0.1 %"
    return f"{float(f'{100 * share:.2g}'):g} %" if share < 0.995 else f"{100 * share:.4g} %"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("openclip_otco.pages", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "jpeg_uri": jpeg_uri, "zip": zip}
    return environment


def _joined(name: str, kind: str) -> str:
    """The asset of all pages and, where there is one, that of the page `name`."""
    return "".join(_ASSETS.joinpath(asset).read_text("utf-8") for asset in _present(f"page.{kind}", f"{name}.{kind}"))


def _present(*assets: str) -> Sequence[str]:
    return [asset for asset in assets if _ASSETS.joinpath(asset).is_file()]


def _hash(text: str) -> str:
    """A source of a content security policy: the inline text of this SHA-256 (W3C, Content Security Policy 3)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
