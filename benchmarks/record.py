"""Result records of benchmarks as JSON, with versions and hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlong.system.provenance import hardware, versions

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Writes ``results/<name>.json`` and returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"benchmark": name, "versions": versions(), "hardware": hardware(), **figures}
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def peak_mib() -> float:
    """Peak resident memory of this process since it began its program (Linux).

    ``getrusage`` would count the memory of the parent process at the time of the fork.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status: peak memory can be read on Linux only")
