"""A headless Chromium without network, to open the pages in as their readers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NoBrowser, launch
from forks import PATIENCE
from PIL import Image

# What strangers may write as a caption.
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror="alert(3)">',
    "' onmouseover='alert(4)' x='",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; </style><svg onload=alert(5)>",
    "-->]]><!-- </title></textarea> \u202e \ud800 \x00",
)


def jpeg(colour: tuple[int, int, int] = (200, 80, 40), size: int = 32) -> bytes:
    """A picture of one colour as a JPEG file."""
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "JPEG")
    return buffer.getvalue()


# Not for the whole session: while Playwright is at work, no other test of the process could run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install -e '.[dev]')")
    with playwright.sync_playwright() as running:
        try:
            started = launch(running)
        except NoBrowser as error:
            pytest.skip(str(error))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file as a reader does, in light or dark; what it says to the console, or asks the network for, fails."""
    contexts, complaints = [], []

    def opened(path: Path, theme: str = "light") -> Any:
        context = browser.new_context(offline=True, color_scheme=theme, viewport={"width": 1280, "height": 900})
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:"))
                or complaints.append(f"request: {request.url}"))  # fmt: skip
        page.goto(path.resolve().as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def every_picture_is_there(page: Any) -> int:
    """Scrolls through the page, so that what loads late is loaded; the number of pictures, none of them broken."""
    return int(
        page.evaluate(
            """async () => {
                const images = [...document.images];
                for (const image of images) { image.loading = "eager"; await image.decode(); }
                return images.filter((image) => image.naturalWidth > 0).length;
            }"""
        )
    )
