"""Commands as the shell starts them, but in this process."""

from openclip_otco import cli


def command(name: str, *words: object) -> int:
    """The exit code of `openclip-otco NAME WORDS`."""
    return cli.main([name, *map(str, words)])
