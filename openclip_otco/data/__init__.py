"""Data: WebDataset shards, their samples, and what is wrong with them."""
