"""Known vulnerabilities of the versions in constraints.txt; without network says so, passes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

UNREACHED = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "SSLError")
COMMAND = ["--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--format", "json"]


def main() -> int:
    """0 if nothing is known or no list was reached, 1 if something is known, 2 on a failure."""
    tool = Path(sys.executable).with_name("pip-audit")
    run = subprocess.run(  # noqa: S603 (the command is our own)
        [tool, *COMMAND, "--progress-spinner", "off"], capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(run.stdout)["dependencies"]
    except ValueError:
        if any(name in run.stderr for name in UNREACHED):
            print("audit skipped: the vulnerability database is not reachable")
            return 0
        print(run.stderr, file=sys.stderr)
        return 2
    # a mirror without a database reports every package as not found, and pip-audit exits with 0
    asked = [one for one in found if "skip_reason" not in one]
    if not asked:
        print("audit skipped: this package index has no vulnerability database")
        return 0
    faults = [(one, fault) for one in asked for fault in one["vulns"]]
    for one, fault in faults:
        fixed = ", ".join(fault["fix_versions"]) or "none yet"
        print(f"{one['name']} {one['version']}: {fault['id']}, fixed in {fixed}")
    unknown = len(found) - len(asked)
    print(f"{len(asked)} packages checked, {unknown} unknown: {len(faults)} vulnerabilities")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
