"""`openclip-otco results`: a page of results whose tables, figures and numbers come from kept runs.

The page is a Jinja template. It names studies, and takes each number about them from their results. So the text and the
runs cannot contradict each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openclip_otco.errors import UserError
from openclip_otco.files import write_text
from openclip_otco.study.measurements import Measurements
from openclip_otco.study.reliability import reliability_picture
from openclip_otco.study.study_results import StudyResults

TEMPLATE = "page.md.jinja"
_NOTE = "<!-- Made by `openclip-otco results` from {template}: edit that, and run `make page`. -->\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `results` to `parser`."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="holds the template, and NAME.jsonl for each list that it names",
    )
    parser.add_argument(
        "--template", default=TEMPLATE, metavar="NAME", help="file of DIR, a page in Jinja's language (%(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR.md)")
    parser.add_argument("--figures", action="store_true", help="draw the pictures anew as well")


def run(args: argparse.Namespace) -> int:
    """`openclip-otco results`: writes the page, and returns 0.

    Raises:
        UserError: as `page`, or a file cannot be read or written.
    """
    try:
        out = args.out or args.folder.with_suffix(".md")
        write_text(out, page(args.folder, args.figures, args.template))
    except OSError as error:
        raise UserError(str(error)) from error
    return 0


def page(folder: Path, figures: bool = False, template: str = TEMPLATE) -> str:
    """The page, made of the template and the results in `folder`.

    A template can call `study(NAME)`, which gives the `StudyResults` of a study, and `lines(NAME)`, which gives the
    `Measurements` of any other list. Further functions give the path of a picture: `reliability(LINES)`, see
    `reliability_picture`; `noise(STUDY, ORACLE)`, `waterfall(STUDY, ABLATIONS, SETTINGS)` and `cost(STUDY, SETTING)`,
    see `page_figures`.

    Args:
        folder: holds the template, and NAME.jsonl for each list that it names.
        figures: also draw the pictures that the page shows, into the folder.
        template: name of its file in `folder`.

    Raises:
        UserError: no template, a mistake in it, or a study or run that is not there.
    """
    import jinja2

    path = folder / template
    if not path.is_file():
        raise UserError(f"{path} is missing; a page of results is a Jinja template")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    known: dict[str, StudyResults] = {}

    def study(name: str) -> StudyResults:
        if name not in known:
            known[name] = StudyResults.read(folder, name, figures)
        return known[name]

    try:
        text = environment.from_string(path.read_text(encoding="utf-8")).render(
            study=study,
            lines=lambda name: Measurements.read(folder / f"{name}.jsonl"),
            reliability=lambda found: reliability_picture(found.path, found.all, figures),
            **_pictures(folder, figures),
        )
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{path}{f', line {line}' if line else ''}: {error}") from error
    except UserError:
        raise
    except Exception as error:  # a template may ask for anything, and each mistake has an error of its own
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    return _NOTE.format(template=f"{folder.name}/{template}") + text


def _pictures(folder: Path, draw: bool) -> dict[str, Callable[..., str]]:
    """The template's functions for pictures of several studies; the first study gives the name, `STUDY-KIND.png`."""

    def template_function(kind: str) -> Callable[..., str]:
        def path_of_picture(first: StudyResults, *others: Any) -> str:
            # Not at the top: they load matplotlib, which a page without --figures does without.
            from openclip_otco.study import page_figures, style

            make = getattr(page_figures, f"{kind}_figure")
            return style.picture(folder / f"{first.study.name}-{kind}.png", draw, lambda: make(first, *others))

        return path_of_picture

    return {kind: template_function(kind) for kind in ("noise", "waterfall", "cost")}
