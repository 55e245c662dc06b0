"""What comes in and goes out over HTTP, with its bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr

MAX_EVENTS, MAX_K, MAX_CANDIDATES, MAX_ID = 1_000, 1_000, 5_000, 128
MAX_INT = 1 << 62
MAX_UNAVAILABLE = 50_000
LATEST = 1 << 40
"""Largest time that is taken, in seconds: far beyond any clock, far below what overflows."""

Id = Annotated[
    Annotated[StrictInt, Field(ge=-MAX_INT, le=MAX_INT)]
    | Annotated[StrictStr, Field(min_length=1, max_length=MAX_ID)],
    Field(description="an integer or a text, of the kind that the log of the model has"),
]
Time = Annotated[StrictInt, Field(ge=0, le=LATEST, description="Unix seconds")]
Places = Annotated[StrictInt, Field(ge=1, le=MAX_K)]
Ids = Annotated[list[Id], Field(max_length=MAX_CANDIDATES)]


class Message(BaseModel):
    """No field but those that are named."""

    model_config = ConfigDict(extra="forbid")


class EventIn(Message):
    """Something that a user did."""

    user_id: Id
    item_id: Id
    timestamp: Time
    event_id: Annotated[
        StrictStr,
        Field(
            max_length=MAX_ID,
            description="two events with one id are one, delivered twice; without it user, item "
            "and time are the id",
        ),
    ] = ""
    fields: Annotated[
        dict[
            Annotated[str, Field(max_length=MAX_ID)],
            Annotated[StrictInt, Field(ge=-(1 << 53), le=1 << 53)] | FiniteFloat,
        ],
        Field(default_factory=dict, max_length=32),
    ]


class EventsIn(Message):
    """Events of any users, each user's in their order."""

    events: Annotated[list[EventIn], Field(min_length=1, max_length=MAX_EVENTS)]


class ReceiptOut(Message):
    """What became of an event: it is on disk, and in the state of its user."""

    shard: int
    offset: Annotated[int, Field(description="its place in the log of the shard; 0 if erased")]
    new: Annotated[bool, Field(description="false if it had been delivered before")]


class EventsOut(Message):
    """One receipt an event, in the order of the request."""

    receipts: list[ReceiptOut]


class RecommendIn(Message):
    """Who wants how many items."""

    user_id: Id
    k: Places = 10
    at: Annotated[Time | None, Field(description="time of the request, Unix seconds")] = None
    filter_seen: StrictBool = True
    leave_out: Ids = []
    among: Annotated[Ids | None, Field(description="the only items that may come")] = None
    min_offset: Annotated[
        StrictInt,
        Field(ge=0, description="wait a moment for the state to have this event of the shard"),
    ] = 0


class RankIn(Message):
    """Candidates to be put in order for a user."""

    user_id: Id
    candidates: Annotated[Ids, Field(min_length=1)]
    at: Time | None = None


class ItemOut(Message):
    """An item and its score."""

    item_id: Id
    score: float


class ListOut(Message):
    """Items, best first."""

    items: list[ItemOut]
    model: Annotated[str, Field(description="digest of the model that answered")]
    known: Annotated[bool, Field(description="whether the user has a state")] = True
    stale: Annotated[bool, Field(description="the state lacks events up to min_offset")] = False


class UserOut(Message):
    """What is known of a user."""

    user_id: Id
    shard: int
    events: int
    last_offset: int
    newest: Annotated[int, Field(description="time of the newest event, Unix seconds")]
    state_bytes: int
    history: Annotated[list[EventOut], Field(description="the last events, newest first")]


class EventOut(Message):
    """An event of the log."""

    offset: int
    item_id: Id
    timestamp: int
    fields: dict[str, int | float]
    known: Annotated[bool, Field(description="whether the item is in the catalogue")]


class ErasedOut(Message):
    """How many events of a user there were; they are overwritten."""

    events: int


class ModelIn(Message):
    """A model folder on the machine of the service."""

    folder: Annotated[StrictStr, Field(min_length=1, max_length=4_096, pattern="^[^\\x00]+$")]
    since: Annotated[
        Time | None,
        Field(
            description="states of users without an event at or after this time are built when "
            "somebody asks for them"
        ),
    ] = None


class ModelOut(Message):
    """The model that answers."""

    name: str
    digest: str
    items: int
    users: int
    bytes_per_user: int
    user_type: Annotated[str, Field(description="integer or text")]
    item_type: Annotated[str, Field(description="integer or text")]
    event_fields: Annotated[
        dict[str, int], Field(description="fields of events that the model reads; codes of each")
    ]
    exact: Annotated[bool, Field(description="lists are exact; else an index finds the items")]
    previous: Annotated[str | None, Field(description="digest of the model before it")] = None
    recall: Annotated[
        float | None, Field(description="share of the best 100 that the index finds")
    ] = None


class UnavailableIn(Message):
    """Items that are not to be recommended."""

    item_ids: Annotated[list[Id], Field(max_length=MAX_UNAVAILABLE, examples=[["tea"]])]


class UnavailableOut(Message):
    """Items that are not recommended."""

    item_ids: list[Id]


class ErrorOut(BaseModel):
    """What was wrong, and what to do."""

    detail: str
