"""One thread for all tests: tiny work is faster so, and much faster on a busy machine."""

import os

import numba
import torch

# numba first: when its threads wake, they set the number of torch's threads to their own
numba.set_num_threads(1)
torch.set_num_threads(1)
# what tests start as processes of their own; numba refuses a change of its variable
os.environ["OMP_NUM_THREADS"] = "1"
