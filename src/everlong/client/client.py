"""A client of the service for any program: it loads neither torch nor the models.

A request that is lost on the way, or that the service asks to repeat, is made again. That is safe:
two events with one id are one event, and every other repeated request changes nothing.
"""

from __future__ import annotations

import email.utils
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

try:
    import httpx
    import msgspec
    from tenacity import (
        RetryCallState,
        Retrying,
        retry_if_exception_type,
        retry_if_result,
        stop_before_delay,
        wait_random_exponential,
    )
except ImportError as error:
    raise ImportError('the client needs more: pip install "everlong[client]"') from error

from everlong.server.http.messages import (
    MAX_EVENTS,
    ErasedOut,
    EventIn,
    EventsOut,
    ListOut,
    ModelIn,
    ModelOut,
    RankIn,
    RankOut,
    ReceiptOut,
    RecommendIn,
    SimilarOut,
    UnavailableIn,
    UnavailableOut,
    UserOut,
)

KEY = "EVERLONG_KEY"
"""The environment variable of the key, for a client without ``key``."""

MAX_BYTES = 1_000_000
"""Bytes of events in a call: the service accepts a little more."""

AGAIN = frozenset({429, 502, 503, 504})
"""Statuses of a passing trouble: an overloaded service, or a proxy that cannot reach it."""

LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
"""Errors of a request on its way."""

UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Those of a request that the service cannot have received."""

JITTER = wait_random_exponential(multiplier=0.1, max=5.0)
"""Seconds before another try: random, so that clients do not return together."""

Id = int | str
Answer = TypeVar("Answer", bound=msgspec.Struct)
EVENT = msgspec.json.Decoder(EventIn)


class ServiceError(RuntimeError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        detail: the reason that the service gives.
    """

    def __init__(self, call: str, status: int, detail: str) -> None:
        super().__init__(f"{call}: {status}, {detail}")
        self.status, self.detail = status, detail


class UnreachableError(ConnectionError):
    """No answer from the service within the patience of the client."""


class Client:
    """A client of one service; threads may share it. Close it by ``close`` or ``with``.

    Every method raises ``ServiceError`` for an error of the service, ``UnreachableError`` without
    an answer, and ``ValueError`` for an argument that the service would refuse.

    Args:
        url: address of the service.
        key: sent as a bearer token; by default the environment variable ``EVERLONG_KEY``, and
            nothing where that is not set.
        timeout: seconds that one try may wait for the network.
        patience: seconds from the first try within which a call is repeated; 0 for one try.

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
            # the error does not quote the key
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

        Returns one receipt for each event, in order, when all events are durable: send an endless
        stream in parts. After an error you may send all of them again; the service recognises
        the stored ones by their ids.

        Args:
            events: each with ``user_id``, ``item_id``, ``timestamp`` (Unix seconds), and if
                possible ``event_id``: without it two events of one user, item and second are one.

        Raises:
            ValueError: for an event that the service would refuse; the events of earlier calls are
                stored.
        """
        receipts: list[ReceiptOut] = []
        try:
            for body in _bodies(events):
                receipts += self._call("POST", "/v1/events", EventsOut, body).receipts
        except Exception as error:
            error.add_note(f"{len(receipts)} events before these are stored")
            raise
        return receipts

    def erase(self, user_id: Id) -> int:
        """Erases a user; returns the number of erased events.

        That is 0 where the answer to a first try was lost.
        """
        return self._call("DELETE", f"/v1/users/{_part(user_id)}", ErasedOut).events

    # answers

    def recommend(
        self,
        user_id: Id,
        *,
        k: int = 10,
        at: int | None = None,
        filter_seen: bool | None = None,
        exclude: Sequence[Id] = (),
        among: Sequence[Id] | None = None,
        min_offset: int = 0,
    ) -> ListOut:
        """The best items for a user.

        Args:
            user_id: any user; ``known`` of the answer tells whether the user has a state.
            k: number of items, at most 1,000.
            at: time of the request, Unix seconds, for models that use it.
            filter_seen: leave out items that the user has seen; None for what the protocol of
                the model says.
            exclude: items to leave out.
            among: the only items that may be listed.
            min_offset: wait a moment until the state contains this offset of the user's shard;
                ``stale`` of the answer is true if it does not.
        """
        body = _body(
            RecommendIn(
                user_id=user_id,
                k=k,
                at=at,
                filter_seen=filter_seen,
                exclude=list(exclude),
                among=None if among is None else list(among),
                min_offset=min_offset,
            )
        )
        return self._call("POST", "/v1/recommend", ListOut, body)

    def rank(self, user_id: Id, candidates: Sequence[Id], *, at: int | None = None) -> RankOut:
        """Candidates in order for a user.

        Candidates that the catalogue does not contain are left out; ``unknown`` of the answer has
        their number and the first of them.
        """
        body = _body(RankIn(user_id=user_id, candidates=list(candidates), at=at))
        return self._call("POST", "/v1/rank", RankOut, body)

    def similar(self, item_id: Id, *, k: int = 10) -> SimilarOut:
        """The items nearest to one; ``ServiceError`` 404 for an item without a vector."""
        return self._call("GET", f"/v1/items/{_part(item_id)}/similar?k={k}", SimilarOut)

    def user(self, user_id: Id) -> UserOut:
        """The state and the last events of a user; ``ServiceError`` 404 for an unknown user."""
        return self._call("GET", f"/v1/users/{_part(user_id)}", UserOut)

    # models

    def model(self) -> ModelOut:
        """The live model."""
        return self._call("GET", "/v1/model", ModelOut)

    def switch(
        self, folder: str, *, since: int | None = None, timeout: float = 3_600.0
    ) -> ModelOut:
        """Makes another model live, once its states are built.

        Args:
            folder: of the model, on the machine of the service.
            since: Unix seconds; the state of a user without an event at or after this time is
                built on the first request for that user.
            timeout: seconds to wait; the service goes on after it, and ``model`` shows the end.
        """
        body = _body(ModelIn(folder=folder, since=since))
        return self._call("POST", "/v1/model", ModelOut, body, once=True, timeout=timeout)

    def roll_back(self) -> ModelOut:
        """Makes the previous model live again.

        A second rollback undoes the first, so that it is not repeated once it may have arrived.
        """
        return self._call("POST", "/v1/model/rollback", ModelOut, once=True)

    def hide(self, item_ids: Sequence[Id]) -> list[Id]:
        """Keeps items out of every list; they replace the earlier ones. Returns them."""
        body = _body(UnavailableIn(item_ids=list(item_ids)))
        return self._call("PUT", "/v1/unavailable", UnavailableOut, body).item_ids

    def hidden(self) -> list[Id]:
        """Items that no list contains."""
        return self._call("GET", "/v1/unavailable", UnavailableOut).item_ids

    def ready(self) -> bool:
        """Whether the service can take requests; asks once."""
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
            return msgspec.json.decode(response.content, type=answer)
        except ValueError as error:
            detail = f"expected {answer.__name__}, received something else: {error}"
            raise ServiceError(call, response.status_code, detail) from None

    def _ask(
        self, method: str, path: str, body: bytes | None, once: bool, timeout: float
    ) -> httpx.Response:
        """The first answer that does not ask to wait, or the last one when patience ends."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        # a call that must not be done twice is repeated only if it cannot have arrived
        again = (
            retry_if_exception_type(UNSENT)
            if once
            else retry_if_exception_type(LOST) | retry_if_result(_passes)
        )
        retrying = Retrying(
            retry=again,
            wait=_wait,
            stop=stop_before_delay(self.patience),
            retry_error_callback=self._give_up,
        )
        try:
            found: httpx.Response = retrying(
                self._http.request, method, path, content=body, headers=headers, timeout=timeout
            )
        except LOST as error:
            raise UnreachableError(
                f"{method} {path}: the answer was lost ({error!r}), and the call may have been "
                "done: look before you repeat it"
            ) from error
        return found

    def _give_up(self, state: RetryCallState) -> httpx.Response:
        """The last answer; raises an error where there was none."""
        outcome = state.outcome
        if outcome is None or (error := outcome.exception()) is not None:
            raise UnreachableError(
                f"{self._http.base_url}: expected an answer, received none in "
                f"{state.attempt_number} tries within {self.patience:g} s ({error!r}); is the "
                "service running there?"
            ) from error
        found: httpx.Response = outcome.result()
        return found


def _passes(response: httpx.Response) -> bool:
    return response.status_code in AGAIN


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: those of ``Retry-After`` and some more."""
    outcome = state.outcome
    asked = 0.0 if outcome is None or outcome.failed else _retry_after(outcome.result())
    return asked + JITTER(state)


def _bodies(events: Iterable[EventIn | Mapping[str, Any]]) -> Iterator[bytes]:
    """Bodies of calls that are small enough.

    Raises:
        ValueError: for an event that the service would refuse.
    """
    parts: list[bytes] = []
    size = 0
    for event in events:
        try:
            part = msgspec.json.encode(event if isinstance(event, EventIn) else dict(event))
        except TypeError as error:
            raise ValueError(f"expected an event that JSON can hold: {error}") from None
        EVENT.decode(part)
        if len(parts) == MAX_EVENTS or (parts and size + len(part) > MAX_BYTES):
            yield b'{"events":[' + b",".join(parts) + b"]}"
            parts, size = [], 0
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield b'{"events":[' + b",".join(parts) + b"]}"


def _body(message: msgspec.Struct) -> bytes:
    """A message as JSON.

    Raises:
        ValueError: if the service would refuse it; msgspec checks bounds when it decodes.
    """
    body = msgspec.json.encode(message)
    msgspec.json.decode(body, type=type(message))
    return body


def _part(given: Id) -> str:
    """An id as a part of a path."""
    # a part of dots alone means the parent folder
    return quote(str(given), safe="").replace(".", "%2E")


def _retry_after(response: httpx.Response) -> float:
    """Seconds of the header ``Retry-After``, or until its date."""
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
    """The reason in an error of the service."""
    try:
        return str(response.json()["detail"])[:2_000]
    except (ValueError, KeyError, TypeError):
        return response.text[:500] or response.reason_phrase
