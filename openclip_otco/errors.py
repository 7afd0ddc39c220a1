"""What a user did wrong, and how it is told."""


class UserError(ValueError):
    """Something given that cannot be used: a flag, a file, a setting.

    The message is one line that names it and says what to change. `openclip_otco.cli` prints it, for all commands, and
    ends with exit code 2.
    """
