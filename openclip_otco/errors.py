"""What a user did wrong, and how it is told."""


class UserError(ValueError):
    """Something given that cannot be used: a flag, a file, a setting.

    The message is one line that names it and says what to change. Commands print it and end with exit code 2.
    """
