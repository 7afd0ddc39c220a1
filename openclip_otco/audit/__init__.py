"""`audit`: which captions of a data set do not belong to their images, as transport plans see it."""


class AuditError(ValueError):
    """Data or settings that cannot be audited; the message is one line that says what to change."""
