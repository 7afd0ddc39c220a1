"""`compare`: runs of OpenCLIP training script side by side."""
