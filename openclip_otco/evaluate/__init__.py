"""`evaluate`: retrieval with several captions an image, and zero-shot classification, of a checkpoint."""


class EvaluationError(ValueError):
    """A checkpoint or data that cannot be evaluated; the message is one line that says what to change."""
