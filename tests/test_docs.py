"""The documentation: nothing is left to be filled in, no link is dead.

Its numbers are those of the runs, its flags those of the parsers, and its code imports what is there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openclip_otco import cli
from openclip_otco.train.plugin import OPTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "tests" / "README.md", *DOCS.rglob("*.md")])
DOCUMENTED = re.findall(r"^::: (\S+)", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"@@\w+@@|\bTODO\b|\{\{", text)
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)", text) if "://" not in link]
    missing = [
        file + sharp + anchor
        for file, sharp, anchor in links
        if not (target := page.parent / file if file else page).exists() or (anchor and anchor not in anchors(target))
    ]
    assert not missing


def test_the_site_links_nothing_outside() -> None:
    outside = {
        (name_of(page), link)
        for page in DOCS.rglob("*.md")
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        if "://" not in link and DOCS not in (page.parent / link).resolve().parents
    }
    assert not outside


def test_every_page_is_named_in_the_index() -> None:
    index = (DOCS / "index.md").read_text() + (DOCS / "parts.md").read_text()
    assert [name_of(page) for page in DOCS.glob("**/*.md") if f"({page.relative_to(DOCS)})" not in index
            and page.parent.name != "results" and page.name != "index.md"] == []  # fmt: skip


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize(
    ("template", "committed"), [("readme.md.jinja", README), ("quickstart.md.jinja", DOCS / "quickstart.md")]
)
def test_numbers_are_those_of_the_runs(template: str, committed: Path, tmp_path: Path) -> None:
    out = tmp_path / committed.name
    assert cli.main(["results", str(DOCS / "results"), "--template", template, "--out", str(out)]) == 0
    assert committed.read_text(encoding="utf-8") == out.read_text(encoding="utf-8")


def test_the_page_of_flags_is_that_of_the_parsers() -> None:
    made = runpy.run_path(str(DOCS / "flags.py"))["page"]()
    assert (DOCS / "flags.md").read_text(encoding="utf-8") == made


def test_defaults_in_the_readme() -> None:
    rows = re.findall(r"^\| `(--otco-\S+)` \| (\S+) \|", README.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 5
    assert dict(rows).items() <= {option.flag: str(option.default).removesuffix(".0") for option in OPTIONS}.items()


def test_targets_of_make_are_named() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert targets is not None
    told = set(re.findall(r"`make ([\w-]+)`", (DOCS / "commands.md").read_text()))
    assert told == set(targets[1].split())


def test_commands_are_named() -> None:
    told = re.findall(r"^\| `openclip-otco (\w+)", (DOCS / "commands.md").read_text(), re.M)
    assert sorted(told) == sorted(cli.COMMANDS)


def test_the_readme_has_the_test_command() -> None:
    assert "\nmake test " in README.read_text(encoding="utf-8")
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=name_of
)
def test_code_imports_what_is_there(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for imported in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(imported, ast.ImportFrom):
            assert imported.module is not None
            module = importlib.import_module(imported.module)
            assert all(hasattr(module, alias.name) for alias in imported.names)


def found(path: str) -> Any:
    """The module, or the name in a module."""
    module, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_the_interface_has_docstrings(path: str) -> None:
    assert inspect.getdoc(found(path))


def test_the_site_can_be_made(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs mkdocs")
    pytest.importorskip("mkdocstrings", reason="make docs installs mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "site" / "api" / "ot.html").read_text()
    assert "combinatorial_plan" in page
    for written in (tmp_path / "site").rglob("*.html"):
        # Nothing is fetched from elsewhere.
        assert not re.search(r"""<(?:script|img|link)[^>]+(?:src|href)=["'](?:https?:)?//""", written.read_text())
