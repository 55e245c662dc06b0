import json
import platform

import numpy as np
import pytest
import torch

import everlong
from everlong.system import provenance
from everlong.system.provenance import hardware, versions


def test_versions_are_those_of_the_running_packages() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["everlong"] == everlong.__version__
    assert set(found) == {"python", "everlong", "torch", "numpy", "numba", "polars"}


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = provenance.version

    def version(name: str) -> str:
        if name == "polars":
            raise provenance.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(provenance, "version", version)
    assert versions()["polars"] == "not installed"
    assert versions()["numpy"] == np.__version__


def test_hardware_is_json() -> None:
    facts = hardware()
    assert facts["processor"]
    assert int(facts["cores"]) >= 1
    assert facts["threads"] == torch.get_num_threads()
    assert ("accelerator" in facts) == torch.cuda.is_available()
    assert json.loads(json.dumps(facts)) == facts
