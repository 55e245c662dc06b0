"""What a conformance suite raises."""

from __future__ import annotations


class ContractBroken(AssertionError):  # noqa: N818 - as LawBroken
    """An implementation does not do what its protocol says."""


def expect(what: str, received: object, expected: object) -> None:
    """Raises ``ContractBroken`` unless two values are equal."""
    if received != expected:
        raise ContractBroken(f"{what}: expected {expected!r}, received {received!r}")
