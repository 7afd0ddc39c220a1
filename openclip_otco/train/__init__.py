"""Training: OpenCLIP's own script. It is started only if `--loss otco` will use OTCO's loss."""
