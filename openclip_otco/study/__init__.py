"""Studies: `compare` trains with several losses and seeds, and `results` makes pages of what came out."""
