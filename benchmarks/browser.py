"""A headless Chromium for the pages' tests and screenshots: Debian's, Google's, or Playwright's own download."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowser(RuntimeError):
    """There is no browser on this machine; the message says how to get one."""


def launch(playwright: Any) -> Any:
    """A running browser of `playwright`, as `playwright.sync_api.sync_playwright` gives it.

    Raises:
        NoBrowser: none is installed, or what is there does not start.
    """
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None and not Path(playwright.chromium.executable_path).is_file():
        raise NoBrowser(
            "no Chromium here: `make browser` installs Debian's as root, `playwright install chromium` its own"
        )
    try:
        # Half a second, as a rule; much longer where the machine is busy.
        return playwright.chromium.launch(executable_path=found, timeout=300_000)
    except Exception as error:  # Playwright's own error, which is only there with Playwright
        raise NoBrowser(f"{found or 'Playwright'}: does not start: {str(error).splitlines()[0]}") from error
