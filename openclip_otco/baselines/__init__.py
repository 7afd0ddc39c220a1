"""Losses that OTCO is compared with, trained by the same script: MoCo, SimCLR as in SLIP, OTTER, RCL."""
