"""`python -m parse_arguments FILE [OPTION ...]`: what OpenCLIP's parser makes of the options, as JSON."""

import json
import sys
from pathlib import Path

from open_clip_train.params import parse_args

Path(sys.argv[1]).write_text(json.dumps(vars(parse_args(sys.argv[2:])), default=str))
