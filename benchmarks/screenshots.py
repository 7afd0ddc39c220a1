"""Pictures of the pages for the docs: `python benchmarks/screenshots.py PAGE.html ... --out docs`."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from browser import NoBrowser, launch
from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1280


def shoot(pages: list[Path], out: Path, theme: str, most: int) -> list[Path]:
    """A PNG of the top `most` pixels of each page, named as the page, in 256 colours; without any network.

    Raises:
        NoBrowser: there is no browser.
    """
    written = []
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for path in pages:
            with browser.new_context(
                offline=True, color_scheme=theme, viewport={"width": WIDTH, "height": most}
            ) as context:
                page = context.new_page()
                page.goto(path.resolve().as_uri())
                page.wait_for_function("[...document.images].slice(0, 12).every((image) => image.naturalWidth > 0)")
                height = min(most, page.evaluate("document.documentElement.scrollHeight"))
                picture = Image.open(
                    io.BytesIO(page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height}))
                )
            written.append(out / f"{path.stem}{'-dark' if theme == 'dark' else ''}.png")
            picture.convert("RGB").save(written[-1], optimize=True)
        browser.close()
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", metavar="PAGE.html", nargs="+", type=Path)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("docs"), help="folder (%(default)s)")
    parser.add_argument("--height", type=int, default=1500, help="pixels of a page to show at most (%(default)s)")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    args = parser.parse_args()
    if missing := [str(page) for page in args.pages if not page.is_file()]:
        parser.error(f"{', '.join(missing)}: no such file; `openclip-otco audit` and `inspect` write pages")
    try:
        for path in shoot(args.pages, args.out, args.theme, args.height):
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")
    except NoBrowser as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
