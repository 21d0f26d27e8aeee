"""pretrain.py in float64, where equal mathematics gives equal numbers: a program for test_resume.py to start."""
import sys

import torch

torch.set_default_dtype(torch.float64)
import data         # noqa: E402
import pretrain     # noqa: E402

try:
    pretrain.main(sys.argv[1:])
except data.UserError as error:
    data.exit_with(error)
