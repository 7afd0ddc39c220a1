"""`evaluate`: what a checkpoint does in retrieval with several captions an image, and in zero-shot classification."""
