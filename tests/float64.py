"""pretrain.py in float64, where equal mathematics gives equal numbers: a program for test_resume.py to start."""
import sys

import torch

torch.set_default_dtype(torch.float64)
import pretrain     # noqa: E402

sys.exit(pretrain.main(sys.argv[1:]))
