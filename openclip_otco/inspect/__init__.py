"""`inspect`: one page on a run, finished or not: its curves, its plans, its hardest negatives."""
