"""Training: OpenCLIP's own script, started when it is sure that `--loss otco` will be OTCO's."""
