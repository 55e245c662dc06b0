"""The messages of the HTTP API, with their bounds.

msgspec checks types and bounds while it parses, and describes the messages for OpenAPI.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MAX_EVENTS, MAX_K, MAX_CANDIDATES, MAX_ID = 1_000, 1_000, 5_000, 128
MAX_INT = 1 << 62
MAX_UNAVAILABLE = 50_000
MAX_UNKNOWN = 20
"""Unknown candidates that the answer to a ranking names."""

LATEST = 1 << 40
"""Largest accepted time in seconds: far beyond any clock, far below what overflows."""

MAX_FIELD = 1 << 53
"""Largest integer in ``fields``, the largest that a float holds exactly."""

Text = Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
Id = Annotated[int, Meta(ge=-MAX_INT, le=MAX_INT)] | Text
UserId = Annotated[
    Id,
    Meta(description="integer or text, as in the log of the model", examples=["ann"]),
]
ItemId = Annotated[
    Id,
    Meta(description="integer or text, as in the log of the model", examples=["tea"]),
]
Time = Annotated[int, Meta(ge=0, le=LATEST, description="Unix seconds", examples=[1_700_000_000])]
ItemIds = Annotated[list[ItemId], Meta(max_length=MAX_CANDIDATES)]
Number = Annotated[int, Meta(ge=-MAX_FIELD, le=MAX_FIELD)] | float


class Request(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A message to the service: a field that has no name here is refused."""


class EventIn(Request):
    """One action of a user."""

    user_id: UserId
    item_id: ItemId
    timestamp: Time
    event_id: Annotated[
        str,
        Meta(
            max_length=MAX_ID,
            description="two events with one id are one event, delivered twice; without an id, "
            "user, item and time identify the event",
        ),
    ] = ""
    fields: Annotated[
        dict[Annotated[str, Meta(max_length=MAX_ID)], Number],
        Meta(max_length=32, description="further fields that the model reads"),
    ] = {}


class EventsIn(Request):
    """Events of any users; those of one user in their order."""

    events: Annotated[list[EventIn], Meta(min_length=1, max_length=MAX_EVENTS)]


class ReceiptOut(Struct):
    """Where an event is stored. It is durable and applied to the state of its user."""

    shard: int
    offset: Annotated[int, Meta(description="position in the log of the shard; 0 if erased")]
    new: Annotated[bool, Meta(description="false for an event that was delivered before")]


class EventsOut(Struct):
    """One receipt for each event, in the order of the request."""

    receipts: list[ReceiptOut]


class RecommendIn(Request):
    """A request for the best items for a user."""

    user_id: UserId
    k: Annotated[int, Meta(ge=1, le=MAX_K, description="number of items")] = 10
    at: Annotated[
        Time | None, Meta(description="time of the request; without it that of the last event")
    ] = None
    filter_seen: Annotated[
        bool | None,
        Meta(
            description="leave out items that the user has seen; without it as the protocol of the "
            "model has it"
        ),
    ] = None
    exclude: Annotated[ItemIds, Meta(description="items to leave out")] = []
    among: Annotated[ItemIds | None, Meta(description="the only items that may be listed")] = None
    min_offset: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_INT,
            description="wait a moment until the state contains this offset of the user's shard",
        ),
    ] = 0


class RankIn(Request):
    """Candidates to sort for a user."""

    user_id: UserId
    candidates: Annotated[list[ItemId], Meta(min_length=1, max_length=MAX_CANDIDATES)]
    at: Annotated[
        Time | None, Meta(description="time of the request; without it that of the last event")
    ] = None


class SimilarIn(Request):
    """Parameters of a request for the items nearest to one."""

    k: Annotated[int, Meta(ge=1, le=MAX_K, description="number of items")] = 10


class ItemOut(Struct):
    """An item and its score."""

    item_id: Id
    score: float


class UnknownOut(Struct):
    """Items of a request that the catalogue does not contain: they are left out."""

    count: int
    item_ids: Annotated[
        list[Id], Meta(max_length=MAX_UNKNOWN, description=f"the first {MAX_UNKNOWN} of them")
    ]


class ListOut(Struct):
    """Items, best first."""

    items: list[ItemOut]
    model: Annotated[str, Meta(description="digest of the model that answered")]
    known: Annotated[bool, Meta(description="whether the user has a state")]
    stale: Annotated[bool, Meta(description="true if the state lacks events up to min_offset")]
    unknown: UnknownOut


class RankOut(Struct):
    """Candidates of the catalogue, best first."""

    items: list[ItemOut]
    model: Annotated[str, Meta(description="digest of the model that answered")]
    known: Annotated[bool, Meta(description="whether the user has a state")]
    unknown: UnknownOut


class SimilarOut(Struct):
    """Items, nearest first."""

    items: list[ItemOut]
    model: Annotated[str, Meta(description="digest of the model that answered")]


class EventOut(Struct):
    """An event of the log."""

    offset: int
    item_id: Id
    timestamp: int
    fields: dict[str, int | float]
    known: Annotated[bool, Meta(description="whether the catalogue contains the item")]


class UserOut(Struct):
    """The state of a user, and the last events."""

    user_id: Id
    shard: int
    events: int
    last_offset: int
    newest: Annotated[int, Meta(description="time of the newest event, Unix seconds")]
    state_bytes: int
    history: Annotated[list[EventOut], Meta(description="the last events, newest first")]


class ErasedOut(Struct):
    """The number of events of a user that were overwritten."""

    events: int


class ModelIn(Request):
    """A model folder on the machine of the service."""

    folder: Annotated[
        str,
        Meta(min_length=1, max_length=4_096, pattern="^[^\\x00]+$", examples=["/models/next"]),
    ]
    since: Annotated[
        Time | None,
        Meta(
            description="the state of a user without an event at or after this time is built on "
            "the first request for that user"
        ),
    ] = None


class ModelOut(Struct):
    """The live model."""

    name: str
    digest: str
    items: int
    users: int
    bytes_per_user: int
    user_type: Annotated[str, Meta(description="integer or text")]
    item_type: Annotated[str, Meta(description="integer or text")]
    event_fields: Annotated[
        dict[str, int], Meta(description="fields of events that the model reads; codes of each")
    ]
    exact: Annotated[bool, Meta(description="whether lists are exact; else an index finds them")]
    previous: Annotated[str | None, Meta(description="digest of the previous model")]
    recall: Annotated[float | None, Meta(description="share of the best 100 that the index finds")]


class UnavailableIn(Request):
    """Items that no list may contain; they replace the earlier ones."""

    item_ids: Annotated[list[ItemId], Meta(max_length=MAX_UNAVAILABLE, examples=[["tea"]])]


class UnavailableOut(Struct):
    """Items that no list contains."""

    item_ids: list[Id]


class StatusOut(Struct):
    """The answer to a probe."""

    status: str


class ErrorOut(Struct):
    """What was wrong, and what to do."""

    detail: str
