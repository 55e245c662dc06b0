"""The count of threads from files as Linux writes them; waiting on the real OpenMP library."""

import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numba
import pytest
import torch

from everlong.system import threads
from everlong.system.threads import (
    COUNTS,
    WAITING,
    Crowding,
    cores,
    limit_libraries,
    limited,
    quota,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads are in /proc on Linux only")
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "31 23 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)
CPU_V1 = "sys/fs/cgroup/cpu,cpuacct"


def machine(root: Path, groups: str, mounts: str, limits: dict[str, str]) -> Path:
    """A folder with the files of ``/proc`` and ``/sys`` that tell the quota."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **limits}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}
    assert quota(machine(tmp_path, "0::/a\n", V2, limits)) == math.inf


def test_version_2_with_a_limit(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/a/cpu.max": "150000 100000\n"}
    assert quota(machine(tmp_path, "0::/a\n", V2, limits)) == 1.5


@pytest.mark.parametrize(("inner", "outer"), [("300000", "50000"), ("50000", "300000")])
def test_the_smallest_of_nested_groups_counts(tmp_path: Path, inner: str, outer: str) -> None:
    limits = {
        "sys/fs/cgroup/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/a/cpu.max": f"{outer} 100000\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/b/c/cpu.max": f"{inner} 100000\n",
        "sys/fs/cgroup/a/other/cpu.max": "1000 100000\n",
    }
    assert quota(machine(tmp_path, "0::/a/b/c\n", V2, limits)) == 0.5


def test_version_1(tmp_path: Path) -> None:
    groups = "4:memory:/m\n3:cpu,cpuacct:/a/b\n1:name=systemd:/\n"
    limits = {
        f"{CPU_V1}/cpu.cfs_quota_us": "-1\n",
        f"{CPU_V1}/cpu.cfs_period_us": "100000\n",
        f"{CPU_V1}/a/cpu.cfs_quota_us": "20000\n",
        f"{CPU_V1}/a/cpu.cfs_period_us": "10000\n",
        f"{CPU_V1}/a/b/cpu.cfs_quota_us": "-1\n",
        f"{CPU_V1}/a/b/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/m/cpu.cfs_quota_us": "1\n",
        "sys/fs/cgroup/memory/m/cpu.cfs_period_us": "100000\n",
    }
    assert quota(machine(tmp_path, groups, V1, limits)) == 2.0


def test_version_1_beside_version_2_without_controllers(tmp_path: Path) -> None:
    mounts = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    limits = {
        f"{CPU_V1}/cpu.cfs_quota_us": "250000\n",
        f"{CPU_V1}/cpu.cfs_period_us": "100000\n",
    }
    assert quota(machine(tmp_path, "2:cpu,cpuacct:/\n0::/\n", mounts, limits)) == 2.5


@pytest.mark.parametrize("mounted", ["/docker/1f", "/elsewhere"])
def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, mounted: str) -> None:
    mounts = f"31 23 0:28 {mounted} /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"
    limits = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "75000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
    }
    assert quota(machine(tmp_path, "3:cpu:/docker/1f\n", mounts, limits)) == 1.5


def test_a_group_outside_the_visible_ones_counts_as_the_root(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/cpu.max": "200000 100000\n", "sys/fs/x/cpu.max": "1 100000\n"}
    assert quota(machine(tmp_path, "0::/../x\n", V2, limits)) == 2.0


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    mounts = "31 23 0:28 / /mnt/my\\040groups rw - cgroup2 cgroup2 rw\n"
    limits = {"mnt/my groups/a/cpu.max": "200000 100000\n"}
    assert quota(machine(tmp_path, "0::/a\n", mounts, limits)) == 2.0


@pytest.mark.parametrize("text", ["", "1\n", "much 100000\n", "1 2 3\n"])
def test_a_file_that_is_no_quota_limits_nothing(tmp_path: Path, text: str) -> None:
    limits = {"sys/fs/cgroup/a/cpu.max": text}
    assert quota(machine(tmp_path, "0::/a\n", V2, limits)) == math.inf


def test_no_quota_where_linux_is_not(tmp_path: Path) -> None:
    assert quota(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 8), ("50000", 1), ("100000", 1), ("150000", 2), ("200000", 2), ("9900000", 8)],
)
def test_cores_are_the_mask_or_the_quota_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr(threads, "_mask", lambda: 8)
    limits = {"sys/fs/cgroup/a/cpu.max": f"{limit} 100000\n"}
    assert cores(machine(tmp_path, "0::/a\n", V2, limits)) == expected


def test_cores_of_this_machine() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.fixture
def three_of_eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores with a quota of 2.5."""
    monkeypatch.setattr(threads, "_mask", lambda: 8)
    return machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": "250000 100000\n"})


def test_a_quota_sets_the_variables_of_both_libraries(three_of_eight: Path) -> None:
    environment: dict[str, str] = {}
    limit_libraries(environment, {}, three_of_eight)
    assert environment == dict.fromkeys(COUNTS, "3")


def test_without_a_quota_nothing_is_set(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    limit_libraries(environment, {}, machine(tmp_path, "0::/\n", V2, {}))
    assert environment == {}


@pytest.mark.parametrize("name", COUNTS)
def test_the_number_that_the_user_has_set_stays(three_of_eight: Path, name: str) -> None:
    environment = {name: "5"}
    limit_libraries(environment, {}, three_of_eight)
    assert environment == {**dict.fromkeys(COUNTS, "3"), name: "5"}


def test_libraries_that_are_loaded_read_no_variable(
    three_of_eight: Path, torch_threads: None
) -> None:
    environment: dict[str, str] = {}
    torch.set_num_threads(8)
    limit_libraries(environment, {"torch": torch, "numba": numba}, three_of_eight)
    assert environment == {}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "8"}])
def test_the_number_that_the_user_has_given_torch_stays(
    three_of_eight: Path, torch_threads: None, environment: dict[str, str]
) -> None:
    given = 8 if environment else 5
    torch.set_num_threads(given)
    limit_libraries(environment, {"torch": torch}, three_of_eight)
    assert torch.get_num_threads() == given


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_fresh_interpreter(source: str, *, cpus: int = 1, **environment: str) -> str:
    """What a script prints that may use some of the cores, with no variable of threads set."""
    threads_of = (*COUNTS, *WAITING, "MKL_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in threads_of}
    text = f"import os\nos.sched_setaffinity(0, range({cpus}))\n" + textwrap.dedent(source)
    command = [sys.executable, "-c", text]
    run = subprocess.run(
        command, env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@LINUX
def test_the_import_loads_neither_library_and_sets_nothing_without_a_quota() -> None:
    if quota() < math.inf:
        pytest.skip("these tests run under a CPU quota")
    source = """
        import sys
        before = dict(os.environ)
        import everlong
        print(sorted({"torch", "numba"} & set(sys.modules)), dict(os.environ) == before)
    """
    assert in_fresh_interpreter(source) == "[] True"


@pytest.fixture
def one_core_group() -> Iterator[Path]:
    """A cgroup with a CPU quota of one core."""
    root, name = Path("/sys/fs/cgroup"), f"everlong-test-{os.getpid()}"
    try:
        if (root / "cgroup.controllers").is_file():
            (root / "cgroup.subtree_control").write_text("+cpu")
            group, limit = root / name, "cpu.max"
        else:
            group, limit = root / "cpu" / name, "cpu.cfs_quota_us"
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        (group / limit).write_text("100000")
        yield group
    finally:
        with suppress(FileNotFoundError):
            group.rmdir()


@LINUX
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a quota is no limit on one core")
@pytest.mark.parametrize("first", ["everlong", "torch"])
@pytest.mark.parametrize("chosen", ["", "2"])
def test_a_real_quota_limits_both_libraries(one_core_group: Path, first: str, chosen: str) -> None:
    source = f"""
        open("{one_core_group}/cgroup.procs", "w").write(str(os.getpid()))
        import {first}
        import everlong, torch, numba
        from everlong.system.threads import yielding
        with yielding():
            print(torch.get_num_threads(), numba.get_num_threads())
    """
    environment = {"OMP_NUM_THREADS": chosen, "NUMBA_NUM_THREADS": chosen} if chosen else {}
    expected = chosen or "1"
    assert in_fresh_interpreter(source, cpus=2, **environment) == f"{expected} {expected}"


def test_a_block_is_limited_in_both_libraries() -> None:
    source = """
        import torch, numba
        from everlong.system.threads import limited, yielding
        def count():
            return torch.get_num_threads(), numba.get_num_threads()
        torch.set_num_threads(3)
        with yielding():
            print(count())
            with limited(2):
                print(count())
            with limited(9):
                print(count())
        print(count())
    """
    found = in_fresh_interpreter(source, NUMBA_NUM_THREADS="4")
    assert found.splitlines() == ["(3, 3)", "(2, 2)", "(3, 3)", "(3, 4)"]


def test_the_number_of_threads_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads(), numba.get_num_threads()
    with pytest.raises(KeyError), limited(1):
        raise KeyError
    assert (torch.get_num_threads(), numba.get_num_threads()) == before


def waited(folder: Path, **nanoseconds: int) -> None:
    for name, value in nanoseconds.items():
        (folder / name.strip("t")).mkdir(exist_ok=True)
        (folder / name.strip("t") / "schedstat").write_text(f"999 {value} 17\n")


def test_crowding_is_the_share_of_the_slowest_thread(tmp_path: Path) -> None:
    now = 0
    waited(tmp_path, t1=500, t2=0)
    crowding = Crowding(tmp_path, lambda: now)
    waited(tmp_path, t1=600, t2=250)
    now = 1_000
    assert crowding.look() == 0.25
    now = 2_000
    assert crowding.look() == 0.0
    # a thread that is new has no wait before
    waited(tmp_path, t1=650, t3=10_000)
    now = 2_100
    assert crowding.look() == 0.5
    (tmp_path / "1" / "schedstat").unlink()
    waited(tmp_path, t3=10_010)
    now = 2_200
    assert crowding.look() == 0.1


def test_the_thread_that_looks_does_not_count(tmp_path: Path) -> None:
    now, own = 0, f"t{threading.get_native_id()}"
    waited(tmp_path, t1=0, **{own: 0})
    crowding = Crowding(tmp_path, lambda: now)
    waited(tmp_path, t1=10, **{own: 900})
    now = 1_000
    assert crowding.look() == 0.01


def test_a_system_that_does_not_tell_counts_as_crowded(tmp_path: Path) -> None:
    assert Crowding(tmp_path).look() == 1.0
    assert Crowding(tmp_path / "missing").look() == 1.0


# a subprocess: pytest's own has one thread, and what waits for a core there is not ours to say
SHARED = """
    import ctypes, threading, time
    import torch
    from everlong.system import threads
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        print("other library")
        raise SystemExit
    def tasks():
        return len(os.listdir("/proc/self/task"))
    def names():
        return [t.name for t in threading.enumerate() if t.name == "everlong threads"]
    def until(reached, work=lambda: time.sleep(0.5)):
        while not reached():
            work()
"""


def shared(source: str, **environment: str) -> str:
    found = in_fresh_interpreter(
        SHARED + textwrap.indent(textwrap.dedent(source), " " * 4), **environment
    )
    if found == "other library":
        pytest.skip("torch does not compute with GNU's OpenMP here")
    return found


@LINUX
def test_more_threads_than_cores_come_and_go() -> None:
    source = """
        library, before = ctypes.CDLL(None), tasks()
        for _ in range(3):
            threads._spin_shortly(library, 2)
            assert tasks() == before + 1
            threads._spin_long(library)
            until(lambda: tasks() == before)
        print("done")
    """
    assert shared(source, OMP_NUM_THREADS="2") == "done"


@LINUX
def test_threads_that_share_a_core_sleep_soon_and_spin_again_without_work() -> None:
    source = """
        a = torch.ones(300, 300)
        # starts what stays
        with threads.yielding():
            a @ a
        until(lambda: not names())
        before = tasks()
        with threads.yielding():
            with threads.yielding():
                until(lambda: tasks() == before + 2, lambda: a @ a)
                print(len(names()))
                until(lambda: tasks() == before + 1)
        until(lambda: not names())
        print(tasks() - before)
    """
    assert shared(source, OMP_NUM_THREADS="2").split() == ["1", "0"]


@LINUX
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"},
        {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"},
        {"OMP_NUM_THREADS": "2", "KMP_BLOCKTIME": "7"},
    ],
)
def test_nothing_is_watched_on_one_thread_or_where_the_user_says_how_to_wait(
    environment: dict[str, str],
) -> None:
    source = """
        with threads.yielding():
            print(names())
    """
    assert shared(source, **environment) == "[]"
