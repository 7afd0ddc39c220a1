"""Optimal transport, alone: costs, plans and divergences. Knows nothing of OpenCLIP."""
