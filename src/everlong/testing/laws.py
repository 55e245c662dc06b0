"""The seven laws, one function each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.state import State
from everlong.models.user_model import UserModel
from everlong.testing.case import LATER_S, Case, arrays, graft, pick
from everlong.testing.memory import changed_part, remember


def fixed_size(case: Case) -> None:
    """Law 1: after 0, 1, T or very many events the state has the spec of the initial state."""
    model, draw = case.model, case.draw
    initial, one = model.initial_state(draw.num_users), model.initial_state(1)
    # the spec has no user axis: one user must look like many
    case.same_spec("initial_state(1)", one, states.take(initial, draw.users[:1]))
    for name, value in zip(states.field_names(initial), initial, strict=True):
        if value.is_floating_point() and value.dtype != draw.dtype:
            raise case.breaks(
                f"field {name!r} is {value.dtype} in a {draw.dtype} model; floating fields are "
                "float32, or float64 in a float64 model"
            )
    none = torch.zeros_like(draw.users)
    for start, state in case.starts():
        case.same_spec(f"the state {start}", initial, state)
        for what, lengths in (("0", none), ("1", none + 1), ("T", draw.lengths())):
            events = case.events(lengths)
            outputs, final = model.encode(events, state)
            case.same_spec(f"the state after encode of {what} events {start}", initial, final)
            if outputs.shape[0] != events.num_events:
                raise case.breaks(
                    f"encode of {what} events: expected {events.num_events} outputs, "
                    f"received {outputs.shape[0]}"
                )
        final = model.step(case.events(none + 1), state)
        case.same_spec(f"the state after step {start}", initial, final)
    many = none[:1] + draw.long_events
    events = case.events(many + 1)
    final = model.encode(pick(events, none[:1], none[:1], many)[0], one)[1]
    case.same_spec(f"the state after encode of {draw.long_events} events", one, final)
    final = model.step(pick(events, none[:1], many, many + 1)[0], final)
    case.same_spec(f"the state after {draw.long_events} events and a step", one, final)


def state_is_enough(case: Case) -> None:
    """Law 6: nothing is changed in place, nothing is kept in the module, bytes are enough."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        inputs_untouched(case, events, state)
        outputs, final = nothing_hidden(case, events, state, start)

        try:
            stored = states.from_bytes(states.to_bytes(final), like=final)
        except (TypeError, ValueError) as error:
            raise case.breaks(f"the state does not survive its bytes: {error}") from error
        stored = type(final)(*(value.to(draw.device) for value in stored))
        scores, later = model.score(final), draw.events(LATER_S, draw.lengths())
        case.same("scores before and after to_bytes", scores, model.score(stored))
        (a, after), (b, resumed) = model.encode(later, final), model.encode(later, stored)
        case.same("outputs that continue from a state and from its bytes", a, b)
        case.same_state("states that continue from a state and from its bytes", after, resumed)

        if scores.shape != (draw.num_users, draw.num_items):
            raise case.breaks(
                f"scores: expected shape {(draw.num_users, draw.num_items)}, "
                f"received {tuple(scores.shape)}"
            )
        candidates_fit(case, final, scores)


def candidates_fit(case: Case, state: State, scores: Tensor) -> None:
    """Raises unless scores of candidates agree with those of the whole catalogue."""
    model, draw = case.model, case.draw
    items = draw.candidates(draw.num_users)
    if not model.set_dependent:
        what = "scores from the whole catalogue and of candidates"
        case.same(what, scores.gather(1, items), model.score(state, items))
        return
    # the catalogue is one set of candidates; in whatever order, each has its score
    every = torch.arange(draw.num_items, device=draw.device).expand(draw.num_users, -1)
    case.same("scores of the catalogue and of all items", scores, model.score(state, every))
    order = torch.randperm(items.shape[1], generator=draw.generator).to(draw.device)
    shuffled = model.score(state, items[:, order])
    case.same(
        "scores of candidates and of the same in another order",
        model.score(state, items)[:, order],
        shuffled,
    )


def inputs_untouched(case: Case, events: Batch, state: State) -> None:
    """Raises if a call changes the state or the batch that it is given."""
    model = case.model
    one = case.events(torch.ones_like(events.lengths))
    items, at = case.draw.candidates(case.draw.num_users), one.times
    calls: dict[str, tuple[Batch, Callable[[Batch, State], object]]] = {
        "encode": (events, model.encode),
        "final_state": (events, model.final_state),
        "forward": (events, model.forward),
        "step": (one, model.step),
        "score": (one, lambda _, given: model.score(given, at=at)),
        "score of candidates": (one, lambda _, given: model.score(given, items, at)),
    }
    for name, (batch, call) in calls.items():
        given = type(state)(*(value.clone() for value in state))
        everything = torch.arange(batch.num_events, device=at.device)
        given_batch = batch.select(everything, batch.offsets.clone())
        call(given_batch, given)
        # without tolerance: the inputs must hold the same bits
        if not all(torch.equal(a, b) for a, b in zip(state, given, strict=True)):
            raise case.breaks(f"{name} changed the state that it was given; return a new one")
        both = zip(arrays(batch), arrays(given_batch), strict=True)
        if not all(torch.equal(a, b) for a, b in both):
            raise case.breaks(f"{name} changed the batch that it was given")


def nothing_hidden(case: Case, events: Batch, state: State, start: str) -> tuple[Tensor, State]:
    """The results of ``encode``; raises if other users in between change them or the module."""
    model, module = case.model, remember(case.model)
    outputs, final = model.encode(events, state)
    blank, _ = model.encode(events)
    scores = model.score(final)

    others = case.events(torch.ones_like(events.lengths))
    _, theirs = model.encode(case.events())
    model.score(model.step(others, theirs))
    model.forward(others)
    if (changed := changed_part(module, remember(model))) is not None:
        raise case.breaks(f"the calls changed {changed!r} of the module; keep it in the state")

    # first of all the call without a state, which a hidden one would take the place of
    blank_again, _ = model.encode(events)
    case.same("outputs without a state before and after other users", blank, blank_again)
    again, final_again = model.encode(events, state)
    case.same(f"outputs {start} before and after other users", outputs, again)
    case.same_state(f"states {start} before and after other users", final, final_again)
    case.same("scores before and after other users", scores, model.score(final))
    return outputs, final


def alone_is_together(case: Case) -> None:
    """Law 5: a user's results do not depend on the other users of the batch."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        outputs, final = model.encode(events, state)
        for user in draw.users:
            same_users(case, f"of a user alone {start}", (events, state), user[None])
        same_users(case, f"of users in another order {start}", (events, state), draw.order())

        for kept in (draw.users[::2], draw.users[1::2]):
            lengths = draw.lengths()
            lengths[kept] = events.lengths[kept]
            new, none = case.events(lengths), torch.zeros_like(kept)
            _, here = pick(new, kept, none, lengths[kept])
            _, there = pick(events, kept, none, lengths[kept])
            new_outputs, new_final = model.encode(graft(new, here, events, there), state)
            what = f"of users with other neighbours {start}"
            case.same(f"outputs {what}", outputs[there], new_outputs[here])
            a, b = states.take(final, kept), states.take(new_final, kept)
            case.same_state(f"states {what}", a, b)


def same_users(case: Case, what: str, given: tuple[Batch, State], rows: Tensor) -> None:
    """Raises unless the users at ``rows [B']`` by themselves get what they get among all."""
    model, (events, state) = case.model, given
    part, index = pick(events, rows, torch.zeros_like(rows), events.lengths[rows])
    own = states.take(state, rows)
    (outputs, final), (own_outputs, own_final) = (
        model.encode(events, state),
        model.encode(part, own),
    )
    case.same(f"outputs {what}", outputs[index], own_outputs)
    case.same_state(f"states {what}", states.take(final, rows), own_final)
    trained, own_trained = model.forward(events, state), model.forward(part, own)
    case.same(f"training outputs {what}", trained[index], own_trained)
    at = torch.full_like(case.draw.users, LATER_S)
    scores, own_scores = model.score(final, at=at), model.score(own_final, at=at[rows])
    case.same(f"scores {what}", scores[rows], own_scores)


def causal(case: Case) -> None:
    """Law 4: a later event changes no earlier output, and neither does its absence."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        outputs, _ = model.encode(events, state)
        for cut in (draw.up_to(events.lengths), (events.lengths - 1).clamp(min=0)):
            early, index = pick(events, draw.users, torch.zeros_like(cut), cut)
            other = graft(draw.events(LATER_S, events.lengths), index, events, index)
            replaced, _ = model.encode(other, state)
            what = f"earlier outputs {start}, later events"
            case.same(f"{what} replaced", outputs[index], replaced[index])
            case.same(f"{what} left out", outputs[index], model.encode(early, state)[0])


def cut_anywhere(case: Case) -> None:
    """Law 3: encode in pieces equals encode at once, also with a step in between."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        lengths, none = events.lengths, torch.zeros_like(events.lengths)
        outputs, final = model.encode(events, state)
        first = draw.up_to(lengths)
        second = first + draw.up_to(lengths - first)
        now = state
        for low, high in ((none, first), (first, second), (second, lengths)):
            part, index = pick(events, draw.users, low, high)
            part_outputs, now = model.encode(part, now)
            case.same(f"outputs of encode in pieces {start}", outputs[index], part_outputs)
        case.same_state(f"states of encode in pieces {start}", final, now)


def cut_through_step(case: Case) -> None:
    """Law 3 with a step: encode, step one event and encode the rest equals encode at once."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        lengths, none = events.lengths, torch.zeros_like(events.lengths)
        outputs, final = model.encode(events, state)
        first = draw.up_to(lengths)
        _, now = model.encode(pick(events, draw.users, none, first)[0], state)
        rows = draw.users[first < lengths]
        part, _ = pick(events, rows, first[rows], first[rows] + 1)
        now = states.put(now, rows, model.step(part, states.take(now, rows)))
        part, index = pick(events, draw.users, (first + 1).minimum(lengths), lengths)
        part_outputs, now = model.encode(part, now)
        case.same(f"outputs of encode, step, encode {start}", outputs[index], part_outputs)
        case.same_state(f"states of encode, step, encode {start}", final, now)


class Step(NamedTuple):
    """One round of ``walk``: where its events stand, their users' states, the states of all."""

    where: Tensor
    before: State
    after: State
    everyone: State


def walk(model: UserModel, events: Batch, state: State) -> Iterator[Step]:
    """Reads the events one by one through ``step``, all users side by side."""
    for t in range(int(events.lengths.max())):
        rows = (events.lengths > t).nonzero().flatten()
        part, index = pick(events, rows, torch.full_like(rows, t), torch.full_like(rows, t + 1))
        before = states.take(state, rows)
        after = model.step(part, before)
        state = states.put(state, rows, after)
        yield Step(index, before, after, state)


def encode_is_step(case: Case) -> None:
    """Law 2: encode and step agree in outputs, final state and gradients of the parameters."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        with torch.enable_grad():
            if start == "from the initial state":
                # made again, because parameters may be behind it
                state = model.initial_state(draw.num_users)
            outputs, final = model.encode(events, state)
            steps = list(walk(model, events, state))
            order = torch.cat([step.where for step in steps]).argsort()
            stepped = torch.cat([model.user_embedding(step.after) for step in steps])[order]
        last = steps[-1].everyone
        case.same_state(
            f"states of encode and advance {start}", final, model.final_state(events, state)
        )
        case.same(f"outputs of encode and step {start}", outputs, stepped)
        case.same_state(f"states of encode and step {start}", final, last)

        on_scores = draw.weights(events.num_events, draw.num_items)
        # a user without events has nothing to learn from, whichever way its state is passed on
        busy = (events.lengths > 0).to(draw.dtype)
        on_state = [
            draw.weights(*value.shape) * busy.view(-1, *[1] * (value.dim() - 1)) for value in final
        ]
        whole = gradients(model, (outputs, final), on_scores, on_state)
        slow = gradients(model, (stepped, last), on_scores, on_state)
        for name, expected in whole.items():
            case.same(f"gradients of {name} by encode and step {start}", expected, slow[name])


def gradients(
    model: UserModel, result: tuple[Tensor, State], on_scores: Tensor, on_state: list[Tensor]
) -> dict[str, Tensor]:
    """The gradient of every parameter for a random loss over all scores and the final state."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss = (model.score_vectors(result[0]) * on_scores).sum()
        for value, weight in zip(result[1], on_state, strict=True):
            if value.is_floating_point():
                loss = loss + (value * weight).sum()
    if not parameters or not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    # the initial state is behind both results, so the graph is needed twice
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(parameters.items(), found, strict=True)
    }


def trained_is_served(case: Case) -> None:
    """Law 7: the training output for an event equals the score just before it, at its time."""
    model, draw = case.model, case.draw
    for start, state in case.starts():
        events = case.events()
        trained = model.forward(events, state)
        items = draw.candidates(events.num_events)
        over_all, over_some = model.score_vectors(trained), model.score_vectors(trained, items)
        what = f"in serving and in training {start}"
        for step in walk(model, events, state):
            at = events.times[step.where]
            case.same(f"scores {what}", model.score(step.before, at=at), over_all[step.where])
            served = model.score(step.before, items[step.where], at)
            case.same(f"scores of candidates {what}", served, over_some[step.where])

        # replace all of the target but its time, and all that follows
        target, none = draw.up_to((events.lengths - 1).clamp(min=0)), torch.zeros_like(draw.users)
        _, early = pick(events, draw.users, none, target)
        other = replace(case.events(events.lengths), times=events.times)
        replaced = model.forward(graft(other, early, events, early), state)
        _, upto = pick(events, draw.users, none, (target + 1).minimum(events.lengths))
        what = f"training outputs {start}, target replaced"
        case.same(what, trained[upto], replaced[upto])


CHECKS: tuple[tuple[int, Callable[[Case], None]], ...] = (
    # every law takes pure calls for granted, and a leak between users or from later events breaks
    # other laws as well: in this order the law that is named is the cause
    (1, fixed_size),
    (6, state_is_enough),
    (5, alone_is_together),
    (4, causal),
    (3, cut_anywhere),
    (2, encode_is_step),
    (3, cut_through_step),
    (7, trained_is_served),
)
