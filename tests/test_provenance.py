"""Every result names versions and hardware."""

from __future__ import annotations

import json

import torch

from everlong.provenance import hardware, versions


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert set(found) == {"python", "everlong", "torch", "numpy", "numba", "polars"}


def test_hardware_is_plain_and_present() -> None:
    found = hardware()
    assert found["processor"]
    assert int(found["threads"]) == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found
