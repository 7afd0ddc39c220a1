"""Frozen features: a locked tower gives equal features for equal inputs, so they are computed once and remembered."""
