"""One thread for all tests: tiny work is faster so, and much faster on a busy machine.

And two models that the tests of the service share, since to fit them takes seconds.
"""

import os
import signal
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import settings

# numba first: when its threads wake, they set the number of torch's threads to their own
numba.set_num_threads(1)
torch.set_num_threads(1)
# what tests start as processes of their own; numba refuses a change of its variable
os.environ["OMP_NUM_THREADS"] = "1"
# no test fails because a machine is slow, or for an example that the last run did not have;
# pytest --hypothesis-profile=random draws others each time
settings.register_profile("random", deadline=None)
settings.register_profile("everlong", deadline=None, derandomize=True)
settings.load_profile("everlong")
# a shell that starts the tests in the background has Ctrl-C ignored
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two models of one log, that differ in their seed; no test writes to them."""
    from tests.server_models import fitted

    folders = [tmp_path_factory.mktemp("models") / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        fitted(seed).save(folder)
    return folders
