"""`evaluate`: retrieval with several captions an image, and zero-shot classification, of a checkpoint."""
