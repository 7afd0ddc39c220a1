"""Model and study configurations that the package brings."""
