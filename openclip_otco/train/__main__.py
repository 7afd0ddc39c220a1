"""`python -m openclip_otco.train` is `openclip-otco train`: for `torchrun -m`."""

import sys

from openclip_otco.train.launch import launch

# Workers of a data loader that are spawned import this module, too.
if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
