"""OTCO: optimal transport plans for contrastive learning, as an OpenCLIP plugin."""
