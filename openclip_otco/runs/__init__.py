"""Runs: what a training leaves behind, a checkpoint first of all, and how tools read it."""
