"""`python -m openclip_otco.train` is `openclip-otco train`: for `torchrun -m`."""

import sys

from openclip_otco.train.launch import launch

# Worker processes of a data loader import this module, too, if they are spawned. They must not start a training.
if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
