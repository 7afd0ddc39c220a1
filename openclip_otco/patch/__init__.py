"""The patch that gives OpenCLIP's training script its plugin point."""
