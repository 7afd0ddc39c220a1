"""Writes flags.md from flags.md.jinja and the parsers themselves: `python docs/flags.py`, or `make flags`."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import jinja2

from openclip_otco.baselines.plugin import BaselinesPlugin
from openclip_otco.cli import COMMANDS
from openclip_otco.frozen.plugin import FrozenFeaturesPlugin
from openclip_otco.models.folder import home
from openclip_otco.study.study_file import shipped_studies
from openclip_otco.train.plugin import OPTIONS

HERE = Path(__file__).parent
# What a parser says of this machine, or of a list that grows.
REPLACED = {
    str(home()): "~/.cache/openclip_otco",
    ", ".join(shipped_studies()): "`openclip-otco compare --help` lists them",
}
PLUGINS = {plugin.name: plugin for plugin in (BaselinesPlugin, FrozenFeaturesPlugin)}


def page() -> str:
    """The text of flags.md.

    Raises:
        ValueError: the template leaves out a flag of OTCO or a command, or has one that is not there.
    """
    named: list[str] = []
    options = {option.flag: option for option in OPTIONS}

    def flag(name: str) -> str:
        """The first two cells of OTCO's flag of that name; the template tells what it means."""
        named.append(name)
        default = options[name].default
        return f"| `{name}` | {f'`{default}`' if isinstance(default, str) else f'{default:g}'}"

    def flags_of(command: str) -> str:
        named.append(command)
        parser = argparse.ArgumentParser(add_help=False)
        import_module(COMMANDS[command][0]).add_arguments(parser)
        return _table(parser)

    def plugin(name: str) -> str:
        parser = argparse.ArgumentParser(add_help=False)
        PLUGINS[name]().add_arguments(parser.add_argument_group())
        return _table(parser)

    def command(name: str) -> str:
        summary = COMMANDS[name][1]
        return f"{summary[0].upper()}{summary[1:]}."

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((HERE / "flags.md.jinja").read_text(encoding="utf-8"))
    text = template.render(flag=flag, flags_of=flags_of, plugin=plugin, command=command)
    # The flags of `train` are OpenCLIP's and the plugins'.
    if left := {*options, *COMMANDS} - {*named, "train"}:
        raise ValueError(f"flags.md.jinja: leaves out {', '.join(sorted(left))}")
    for here, anywhere in REPLACED.items():
        text = text.replace(here, anywhere)
    return text


def _table(parser: argparse.ArgumentParser) -> str:
    rows = ["| flag | meaning |", "| --- | --- |"]
    for action in parser._actions:
        rows.append(f"| `{_usage(action)}` | {_meaning(action)} |")
    return "\n".join(rows)


def _usage(action: argparse.Action) -> str:
    """The flag and what follows it; of a positional argument, what stands for it."""
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.nargs == "?":
        value = f"[{value}]"
    return " ".join([*action.option_strings[:1], *([str(value)] if value else [])])


def _meaning(action: argparse.Action) -> str:
    """Its help text, with what argparse fills in."""
    assert action.help is not None
    meaning = action.help % {**vars(action), "prog": "openclip-otco"}
    return meaning.replace("|", "\\|")


if __name__ == "__main__":
    (HERE / "flags.md").write_text(page(), encoding="utf-8")
