"""Errors of the library in the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "feed their events with update(), or pass {name: [item ids]} to recommend from a history": (
            "recommend from a history with --history 'a,b,c', or fit on a log that has them"
        ),
        "feed the events with update() first": "name a user of the log with --user",
        "pass items=, and leave vectors out of the architecture": (
            "give --items and --vectors, and leave out --set vectors"
        ),
        "read the log with fields=": "name it with --label, --request or in --set fields, here ",
        "or name the field request=": "or name its column with --request",
        ", or pass time_unit= if they are right": "",
        "fit a ranker with fit_ranker": "fit one with everlong fit --task rank",
        "write one with save()": "write one with everlong fit",
    }
)
"""What the library says, and what the command line says instead."""


CALLS: Mapping[str, str] = MappingProxyType(
    {
        "everlong.fit_ranker": "everlong fit --task rank",
        "everlong.fit:": "everlong fit --task next-item:",
    }
)
"""Functions, and the commands that call them."""


def in_words_of_command_line(text: str) -> str:
    """The text of an error without names of Python."""
    for said, instead in (*WORDS.items(), *CALLS.items()):
        text = text.replace(said, instead)
    return text
