"""A client of the service, light enough for any program: neither torch nor the models are loaded.

Requests that fail on the way or are told to wait are made again. That is safe, because two events
with one id are one event, and because everything else that is made again changes nothing the second
time.
"""

from __future__ import annotations

import email.utils
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

try:
    import httpx
except ImportError as error:
    raise ImportError('the client takes more: pip install "everlong[client]"') from error
from pydantic import BaseModel, ValidationError

from everlong.server.http.messages import (
    MAX_EVENTS,
    ErasedOut,
    EventIn,
    EventsOut,
    ListOut,
    ModelIn,
    ModelOut,
    RankIn,
    ReceiptOut,
    RecommendIn,
    UnavailableIn,
    UnavailableOut,
    UserOut,
)

KEY = "EVERLONG_KEY"
"""The environment variable that holds the key where none is given."""

MAX_BYTES = 1_000_000
"""Of events in a call: the service takes a little more."""

AGAIN = frozenset({429, 502, 503, 504})
"""Statuses that pass: the service has much to do, or something before it does not reach it."""

LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""What happens to a request on its way."""

UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""What happens to it before the service can have seen it."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0

Id = int | str
Answer = TypeVar("Answer", bound=BaseModel)


class ServiceError(RuntimeError):
    """The service answered, but not with what was asked for.

    Attributes:
        status: HTTP status.
        detail: what the service says was wrong.
    """

    def __init__(self, call: str, status: int, detail: str) -> None:
        super().__init__(f"{call}: {status}, {detail}")
        self.status, self.detail = status, detail


class UnreachableError(ConnectionError):
    """No answer came from the service, though it was asked again and again."""


class Client:
    """Talks to a service; may be shared by threads, and is closed by ``close`` or ``with``.

    Every method raises ``ServiceError`` for an answer that is not what was asked for and
    ``UnreachableError`` if there is none.

    Args:
        url: where the service is.
        key: sent as a bearer token; by default the environment variable ``EVERLONG_KEY``, and
            nothing where it is not set.
        timeout: seconds that one try may wait for the network.
        patience: seconds from the first try within which a call is made again; 0 for one try.

    Raises:
        ValueError: if the key cannot be sent in a header.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        timeout: float = 5.0,
        patience: float = 30.0,
    ) -> None:
        secret = os.environ.get(KEY, "") if key is None else key
        if not (secret.isascii() and secret.isprintable()):
            # the key itself is never told
            raise ValueError("key: expected printable ASCII, received other characters")
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self.timeout, self.patience = timeout, patience

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    # events

    def send(self, events: Iterable[EventIn | Mapping[str, Any]]) -> list[ReceiptOut]:
        """Sends events in calls of at most 1,000, one after the other, so that order is kept.

        One receipt an event comes back, in order, once all are on the disk of the service: give a
        stream without end in parts. After an error all of them may be sent again; those that had
        arrived are known by their ids.

        Args:
            events: each with ``user_id``, ``item_id``, ``timestamp`` (Unix seconds), and if
                possible ``event_id``: without it two events of one user, item and second are one.

        Raises:
            ValueError: if an event is not one; those of the calls before are sent.
        """
        receipts: list[ReceiptOut] = []
        try:
            for body in _bodies(events):
                receipts += self._call("POST", "/v1/events", EventsOut, body).receipts
        except Exception as error:
            error.add_note(f"{len(receipts)} events before these are on the disk of the service")
            raise
        return receipts

    def erase(self, user_id: Id) -> int:
        """Erases a user; returns how many events there were.

        That is 0 where the answer to a first try was lost on the way.
        """
        return self._call("DELETE", f"/v1/users/{_part(user_id)}", ErasedOut).events

    # answers

    def recommend(
        self,
        user_id: Id,
        *,
        k: int = 10,
        at: int | None = None,
        filter_seen: bool = True,
        leave_out: Sequence[Id] = (),
        among: Sequence[Id] | None = None,
        min_offset: int = 0,
    ) -> ListOut:
        """The best items for a user.

        Args:
            user_id: anybody; ``known`` of the answer says whether there are events.
            k: items, at most 1,000.
            at: time of the request, Unix seconds, for models that use it.
            filter_seen: leave out what the user has seen.
            leave_out: items that must not come.
            among: the only items that may come.
            min_offset: wait a moment for the state to have this event of the user's shard;
                ``stale`` of the answer says that it has not.
        """
        asked = RecommendIn(
            user_id=user_id,
            k=k,
            at=at,
            filter_seen=filter_seen,
            leave_out=list(leave_out),
            among=None if among is None else list(among),
            min_offset=min_offset,
        )
        return self._call("POST", "/v1/recommend", ListOut, _body(asked))

    def rank(self, user_id: Id, candidates: Sequence[Id], *, at: int | None = None) -> ListOut:
        """Candidates in order for a user; those that the model does not know are left out."""
        asked = RankIn(user_id=user_id, candidates=list(candidates), at=at)
        return self._call("POST", "/v1/rank", ListOut, _body(asked))

    def similar(self, item_id: Id, *, k: int = 10) -> ListOut:
        """The items nearest to one; ``ServiceError`` 404 if the model does not know it."""
        return self._call("GET", f"/v1/items/{_part(item_id)}/similar?k={k}", ListOut)

    def user(self, user_id: Id) -> UserOut:
        """What is known of a user; ``ServiceError`` 404 of one who is not."""
        return self._call("GET", f"/v1/users/{_part(user_id)}", UserOut)

    # models

    def model(self) -> ModelOut:
        """The model that answers."""
        return self._call("GET", "/v1/model", ModelOut)

    def switch(
        self, folder: str, *, since: int | None = None, timeout: float = 3_600.0
    ) -> ModelOut:
        """Makes another model live, once its states are built.

        Args:
            folder: of the model, on the machine of the service.
            since: Unix seconds; states of users without an event from then on are built when
                somebody asks for them.
            timeout: seconds to wait; after that the service goes on alone, and ``model`` tells.
        """
        body = _body(ModelIn(folder=folder, since=since))
        return self._call("POST", "/v1/model", ModelOut, body, once=True, timeout=timeout)

    def roll_back(self) -> ModelOut:
        """Makes the model live again that was live before the last switch.

        Done twice it undoes itself, so that it is not tried again once it may have arrived.
        """
        return self._call("POST", "/v1/model/rollback", ModelOut, once=True)

    def hide(self, item_ids: Sequence[Id]) -> list[Id]:
        """Keeps items out of every list from now on, instead of those before; returns them."""
        body = _body(UnavailableIn(item_ids=list(item_ids)))
        return self._call("PUT", "/v1/unavailable", UnavailableOut, body).item_ids

    def hidden(self) -> list[Id]:
        """Items that are kept out of every list."""
        return self._call("GET", "/v1/unavailable", UnavailableOut).item_ids

    def ready(self) -> bool:
        """Whether requests may come; asked once."""
        try:
            return self._http.get("/readyz").status_code == 200
        except LOST:
            return False

    # the wire

    def _call(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        body: bytes | None = None,
        *,
        once: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        call = f"{method} {path.partition('?')[0]}"
        response = self._ask(method, path, body, once, self.timeout if timeout is None else timeout)
        if not response.is_success:
            raise ServiceError(call, response.status_code, _detail(response))
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            detail = f"expected {answer.__name__}, received something else: {error}"
            raise ServiceError(call, response.status_code, detail) from None

    def _ask(
        self, method: str, path: str, body: bytes | None, once: bool, timeout: float
    ) -> httpx.Response:
        """The first answer that is no request to wait, or whatever came when patience ends."""
        began, tries = time.monotonic(), 0
        headers = {} if body is None else {"Content-Type": "application/json"}
        while True:
            asked = 0.0
            try:
                response = self._http.request(
                    method, path, content=body, headers=headers, timeout=timeout
                )
                if once or response.status_code not in AGAIN:
                    return response
                asked, failed = _retry_after(response), None
            except LOST as error:
                if once and not isinstance(error, UNSENT):
                    raise UnreachableError(
                        f"{method} {path}: the answer was lost ({error!r}), and it may have been "
                        "done: look before you ask again"
                    ) from error
                failed = error
            wait = asked + _jittered(tries)
            tries += 1
            if time.monotonic() - began + wait > self.patience:
                if failed is None:
                    return response
                raise UnreachableError(
                    f"{self._http.base_url}: expected an answer, received none in {tries} tries "
                    f"within {self.patience:g} s ({failed!r}); is the service running there?"
                ) from failed
            time.sleep(wait)


def _bodies(events: Iterable[EventIn | Mapping[str, Any]]) -> Iterator[bytes]:
    """Bodies of calls that are small enough."""
    parts: list[bytes] = []
    size = 0
    for event in events:
        given = event if isinstance(event, EventIn) else EventIn.model_validate(event)
        part = given.model_dump_json(exclude_defaults=True).encode()
        if len(parts) == MAX_EVENTS or (parts and size + len(part) > MAX_BYTES):
            yield b'{"events":[' + b",".join(parts) + b"]}"
            parts, size = [], 0
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield b'{"events":[' + b",".join(parts) + b"]}"


def _body(message: BaseModel) -> bytes:
    return message.model_dump_json(exclude_defaults=True).encode()


def _part(given: Id) -> str:
    """An id as a part of a path, whatever is in it."""
    # dots alone would be read as a way up the path
    return quote(str(given), safe="").replace(".", "%2E")


def _jittered(tries: int) -> float:
    """Seconds to wait: longer each time, and never the same as others do."""
    return random.uniform(0.0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**tries))  # noqa: S311


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the service asks to be left alone."""
    said = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return 0.0
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _detail(response: httpx.Response) -> str:
    """What an answer says was wrong."""
    try:
        return str(response.json()["detail"])[:2_000]
    except (ValueError, KeyError, TypeError):
        return response.text[:500] or response.reason_phrase
