"""The command `openclip-otco`."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from openclip_otco.errors import UserError
from openclip_otco.version import __version__

UNUSABLE = 2
# Each module has add_arguments(parser) and run(args) -> exit code, but for that of `train`, whose arguments are
# OpenCLIP's. Only that of the chosen command is imported, because patching has to work without torch.
COMMANDS = {
    "train": ("openclip_otco.train.launch", "OpenCLIP's training script, after a check that it has OTCO's losses"),
    "patch": ("openclip_otco.patch.command", "give OpenCLIP's training script its plugin point, or take it away again"),
    "scenes": ("openclip_otco.scenes.shards", "render pairs of a scene and its caption as webdataset shards"),
    "evaluate": ("openclip_otco.evaluate.command", "measure retrieval and zero-shot classification of a checkpoint"),
    "inspect": (
        "openclip_otco.inspect.command",
        "show a run, finished or not, on one page: curves, plans, hard negatives",
    ),
    "audit": ("openclip_otco.audit.command", "find the captions of a data set that do not belong to their images"),
    "compare": ("openclip_otco.study.compare", "train the same model with several losses and compare them"),
    "results": ("openclip_otco.study.page", "write a page of results from a template and the runs that studies kept"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, by default the one on the command line, and returns its exit code (misuse exits with 2)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next(iter(arguments), None)
    if chosen == "train":  # `--help`, too, is for OpenCLIP
        from openclip_otco.train.launch import launch

        return launch(arguments[1:])
    parser = argparse.ArgumentParser(prog="openclip-otco", description="Tools beside the OpenCLIP plugin OTCO.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        # No abbreviations: a slip in a study's file must not be taken for another flag.
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        if name == chosen:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    args = parser.parse_args(arguments)
    return exit_code(str(chosen), lambda: args.run(args))


def exit_code(command: str, run: Callable[[], int]) -> int:
    """The exit code that `run` returns; 2 after one line on stderr where it raises a `UserError`.

    Args:
        command: its name, with which the line begins.
        run: does what the command is asked for.
    """
    try:
        return run()
    except UserError as error:
        print(f"openclip-otco {command}: {error}", file=sys.stderr)
        return UNUSABLE


if __name__ == "__main__":
    sys.exit(main())
