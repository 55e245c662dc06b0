"""A benchmark's result as JSON: figures, and the versions and hardware that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlong.provenance import hardware, versions

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Writes ``results/<name>.json`` and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"benchmark": name, "versions": versions(), "hardware": hardware(), **figures}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
