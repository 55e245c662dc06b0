"""From a log to a recommender: split, train, choose on validation, test, build all states."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.data.dataset import Dataset
from everlong.data.events import Events, read_events
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable
from everlong.data.reading import Source
from everlong.data.split import PAPER, TEMPORAL, Protocol, Split, Targets, split
from everlong.evaluation.metrics import DEFAULT, RANK_METRICS
from everlong.evaluation.next_item import Evaluation, evaluate
from everlong.models.decoder import DecoderConfig
from everlong.models.device import named_device
from everlong.models.item_vectors import item_vectors
from everlong.models.registry import config_class, load_model_class, model_name
from everlong.models.user_model import UserModel
from everlong.recommender.origin import Origin, data_facts
from everlong.recommender.recipe import follow, initialised, training_settings
from everlong.recommender.recommender import Recommender
from everlong.text.pretrained import decoder_architecture, decoder_of, load_decoder
from everlong.training.loop import TrainResult
from everlong.training.next_item import train
from everlong.training.settings import TrainConfig

log = logging.getLogger(__name__)

PROTOCOLS: Mapping[str, Protocol] = {"paper": PAPER, "temporal": TEMPORAL}


def fit(
    events: Source | Events,
    model: str | type[UserModel] = "lru",
    *,
    items: ItemTable | None = None,
    pretrained: str | Path | None = None,
    architecture: Mapping[str, Any] | None = None,
    training: TrainConfig | Mapping[str, Any] | None = None,
    protocol: str | Protocol | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
) -> Recommender:
    """A recommender trained on a log, with the states of all its users.

    The log is split by the protocol; the model learns from the training part, the best epoch is
    chosen on the validation part, and the test part is measured once. Then every user's whole
    history is read, so that recommendations follow the last event of the log.

    Args:
        events: ``Events``, or anything that ``read_events`` reads, with its default columns.
        model: a built-in model by name, a model of an installed plug-in by the name of its entry
            point (group ``everlong.models``), or one of your own: its class, or its import path
            ``package.module:Class``.
        items: what items have besides their ids. All vector columns, side by side, are vectors of
            the items of models that take them (``vectors`` in their architecture, which follows
            from these); ``architecture={"ids": False}`` then leaves out the embeddings of ids.
        pretrained: a causal language model, by name or folder, whose layers the decoder of
            ``hllm`` and of the models over it begins with; its sizes are those of the decoder.
        architecture: settings of the model that differ from its defaults.
        training: settings of the training that differ from their defaults.
        protocol: ``"temporal"``, ``"paper"`` or a protocol of your own; by default ``temporal``
            where the log has times and ``paper`` where it has only an order.
        folder: where checkpoints and the training log go.
        resume: continue from the checkpoint in ``folder``.
        device: where to train and score.

    Raises:
        ValueError: for unknown names or settings, a log that cannot be read or split, or items of
            which none in the training part has a vector.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    # settings first: a misspelt one must not cost the reading of a long log
    model_class = load_model_class(model)
    best = {str(metric): RANK_METRICS[metric.name].best for metric in DEFAULT}
    config = training_settings(TrainConfig, training, best)
    place = named_device(device)
    if not isinstance(events, Events):
        events = read_events(events)
    parts = split(events, choose_protocol(protocol, events))
    settings = {**_sizes(model_class, pretrained), **(architecture or {})}
    data = data_facts(events)
    vectors = None
    if items is not None and items.vectors:
        if "vectors" in {f.name for f in dataclasses.fields(config_class(model_class))}:
            vectors = _vectors_of(items, parts.events.item_ids)
            settings.setdefault("vectors", vectors.shape[1])
            data["item_vectors"] = items.vector_widths
        else:
            log.info(
                "model %s knows items by their ids: their vectors are not used",
                model_name(model_class),
            )
    network = initialised(model_class, settings, parts.events.num_items, config.seed).to(place)
    _fill(network, vectors)
    if pretrained is not None:
        load_decoder(decoder_of(network), pretrained)
        data["pretrained"] = str(pretrained)
    return follow(NextItemFit(network, config, events, parts, data, place), folder, resume)


@dataclass(frozen=True, eq=False)
class NextItemFit:
    """A model that learns to predict the next item, by the parts of a log."""

    model: UserModel
    config: TrainConfig
    events: Events
    parts: Split
    data: Mapping[str, Any]
    device: torch.device

    def train(self, folder: Path | None, resume: bool) -> TrainResult:
        has_validation = self.parts.validation.user.size > 0
        if not has_validation:
            log.warning("no held-out events: the last epoch is kept, and quality is not measured")
        return train(
            self.model,
            Dataset(self.parts.events, self.parts.train),
            self.config,
            validate=self._validate if has_validation else None,
            folder=folder,
            resume=resume,
            device=self.device,
        )

    def _validate(self, model: UserModel) -> dict[str, float]:
        found = self._evaluate(self.parts.validation)
        return {name: value.mean for name, value in found.metrics.items()}

    def _evaluate(self, targets: Targets) -> Evaluation:
        return evaluate(self.model, self.parts.events, targets, seen=self.parts.protocol.seen)

    def measure(self) -> Mapping[str, Mapping[str, Any]]:
        parts = {"validation": self.parts.validation, "test": self.parts.test}
        return {
            name: {**self._evaluate(targets).as_dict(), **self.parts.record()}
            for name, targets in parts.items()
            if targets.user.size
        }

    def recommender(self, metrics: Mapping[str, Mapping[str, Any]]) -> Recommender:
        origin = Origin(
            model=model_name(type(self.model)),
            train=self.config,
            protocol=self.parts.protocol,
            time_unit=self.events.facts.time_unit,
            data=self.data,
            metrics=metrics,
        )
        return Recommender(self.model, self.parts.events.item_ids, origin)


def choose_protocol(protocol: str | Protocol | None, events: Events) -> Protocol:
    """The protocol that was named, or the one that the log allows.

    Raises:
        ValueError: if there is no protocol of that name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol is None:
        protocol = "paper" if events.facts.time_unit == "position" else "temporal"
        log.info("protocol %s, because of the times of this log", protocol)
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def _sizes(model_class: type[UserModel], pretrained: str | Path | None) -> dict[str, Any]:
    """The sizes of a decoder that has room for a language model."""
    if pretrained is None:
        return {}
    if not issubclass(config_class(model_class), DecoderConfig):
        raise ValueError(
            f"expected a model over a decoder, such as hllm, received {model_class.__name__}; "
            "leave out pretrained"
        )
    return decoder_architecture(pretrained)


def _vectors_of(items: ItemTable, item_ids: IdMap) -> Tensor:
    """Vectors ``[I, V]`` of the items of a catalogue; zeros, counted, where there is none."""
    vectors = torch.from_numpy(items.joined_vectors(item_ids))
    missing = int((vectors == 0).all(1).sum())
    if missing == len(vectors):
        raise ValueError(
            f"expected vectors of the items of the log, e.g. {item_ids.ids([0])[0]!r}, received "
            "some for none of them; give items by the ids that the log has"
        )
    if missing:
        log.warning("%d of %d items have no vector: zeros stand for it", missing, len(vectors))
    return vectors


def _fill(model: UserModel, vectors: Tensor | None) -> None:
    """Gives a model the vectors of its items, if it is made for vectors."""
    inside = item_vectors(model)
    if inside is not None and vectors is not None:
        inside.fill(vectors)
    elif inside is not None and inside.config.vectors:
        raise ValueError(
            f"the architecture has vectors={inside.config.vectors}: expected items with vectors, "
            "received none; pass items=, and leave vectors out of the architecture"
        )
