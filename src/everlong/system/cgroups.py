"""The cgroups that this process is in: where Linux says what a container may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of this process's cgroups, from the inner to the outer.

    Those of version 2, and those of version 1 that have the controller.

    Args:
        controller: such as ``"cpu"`` or ``"memory"``.
        root: where ``proc`` and ``sys`` are.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {}
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            paths["cgroup2" if number == "0" else "cgroup"] = path
    for line in mounts:
        place, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        mounted, point = (_plain(part) for part in place.split()[3:5])
        inner, outer = Path(paths[kind]), Path(mounted)
        # a container may see the path of its cgroup on the host, and as a folder only that cgroup
        below = inner.relative_to(outer) if inner.is_relative_to(outer) else Path()
        below = Path() if ".." in below.parts else below
        for part in (below, *below.parents):
            yield root / point.lstrip("/") / part


def _plain(text: str) -> str:
    """A path of ``mountinfo``, where spaces and the like are written as octal numbers."""
    return text.encode().decode("unicode_escape")
