"""Short and long forms of tests that find the more the longer they run."""

from __future__ import annotations

import os
from typing import Any

import pytest


def forms(name: str, short: str, long: str) -> list[Any]:
    """Two values of a parameter: the short form for ``make test``, the long for ``make test-slow``.

    The variable ``EVERLONG_<NAME>`` sets the long one to a length of its own.
    """
    chosen = os.environ.get(f"EVERLONG_{name}", long)
    return [pytest.param(short, id="short"), pytest.param(chosen, id="long", marks=SLOW)]


SLOW = pytest.mark.slow


def slow(*values: Any) -> Any:
    """A case of a parametrized test that ``make test-slow`` alone runs."""
    return pytest.param(*values, marks=SLOW)
