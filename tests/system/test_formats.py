from pathlib import Path

import pytest

from everlong.system.formats import NewerFormatError, check_version, migrate

STEPS = (lambda text: text + "b", lambda text: text + "c")


@pytest.mark.parametrize(("version", "expected"), [(1, "abc"), (2, "ac"), (3, "a")])
def test_each_version_runs_its_missing_migrations(version: int, expected: str) -> None:
    assert migrate("a", version, STEPS) == expected


def test_a_version_that_is_known_is_returned() -> None:
    assert check_version(Path("x"), "a log", 2, 3) == 2


@pytest.mark.parametrize(
    ("written_by", "words"),
    [("0.9.1", "install everlong 0.9.1 or later"), (None, "install a later everlong")],
)
def test_the_error_of_a_later_version_names_the_version_to_install(
    written_by: str | None, words: str
) -> None:
    with pytest.raises(NewerFormatError, match=f"^x is a log of version 4; .* up to 3: {words}$"):
        check_version(Path("x"), "a log", 4, 3, written_by=written_by)


@pytest.mark.parametrize("version", [0, -1, "2", None, True, 1.0])
def test_invalid_versions_are_refused(version: object) -> None:
    with pytest.raises(ValueError, match="expected the version of a log, from 1 to 3"):
        check_version(Path("x"), "a log", version, 3)
