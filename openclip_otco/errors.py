"""What a user did wrong, and how it is told."""


class UserError(ValueError):
    """Something given that cannot be used: a flag, a file, a setting.

    The message is one line that names it and says what to change. `openclip_otco.cli` prints it, for all commands, and
    ends with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of the message, or else the name of the error's type: what most libraries say in short."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line of the message. An error from a worker process has a traceback in the lines before."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
