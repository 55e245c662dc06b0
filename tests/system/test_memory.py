import os
from pathlib import Path

import pytest

from everlong.system.memory import MemoryBudget, memory_limit

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
UNIFIED = "30 1 0:26 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
OWN = "31 1 0:27 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def system(root: Path, membership: str, mounts: str, files: dict[str, str]) -> Path:
    """A root with the files of a kernel."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "mounts", "files", "expected"),
    [
        ("0::/a/b\n", UNIFIED.format(root="/"), {"a/b/memory.max": "7000000\n"}, 7_000_000),
        # the limit of an outer group holds inside
        (
            "0::/a/b\n",
            UNIFIED.format(root="/"),
            {"a/b/memory.max": "max\n", "a/memory.max": "5000000\n"},
            5_000_000,
        ),
        ("0::/a/b\n", UNIFIED.format(root="/"), {"a/b/memory.max": "max\n"}, PHYSICAL),
        # a container that sees its path on the host
        ("0::/host/c\n", UNIFIED.format(root="/host/c"), {"memory.max": "6000000\n"}, 6_000_000),
        (
            "4:memory:/a\n0::/\n",
            OWN.format(root="/"),
            {"memory/a/memory.limit_in_bytes": "8000000\n"},
            8_000_000,
        ),
        # no limit is written as a number beyond all memory
        (
            "4:memory:/a\n",
            OWN.format(root="/"),
            {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"},
            PHYSICAL,
        ),
        ("4:cpu:/a\n", OWN.format(root="/"), {}, PHYSICAL),
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, membership: str, mounts: str, files: dict[str, str], expected: int
) -> None:
    assert memory_limit(system(tmp_path, membership, mounts, files)) == expected


def test_without_cgroups_it_is_the_physical_memory(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) == PHYSICAL


def test_a_budget_gives_what_it_has() -> None:
    budget = MemoryBudget(100)
    budget.reserve(60, "one")
    assert budget.free == 40
    with pytest.raises(
        MemoryError, match=r"two: expected 41 bytes more within the 100 .* found 40"
    ):
        budget.reserve(41, "two")
    assert budget.free == 40
    budget.release(60)
    budget.reserve(100, "two")
    assert budget.free == 0
