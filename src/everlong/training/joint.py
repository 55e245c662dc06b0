"""Training of a model together with the item encoder that its vectors come from.

Of each micro-batch the items that are read, asked for or drawn as negatives are encoded
anew, and gradients go through them into the encoder; all others stand as they were encoded last.
Before each validation, and at the end, the whole catalogue is encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from everlong.data.dataset import Dataset, TrainBatch
from everlong.models.batch import Batch
from everlong.models.item_vectors import ItemVectors, item_vectors
from everlong.models.user_model import UserModel
from everlong.text.causal import CausalEncoder
from everlong.training.loop import TrainResult, Validate, run
from everlong.training.next_item import NextItem
from everlong.training.next_item_losses import NEXT_ITEM_LOSSES, Negatives
from everlong.training.settings import TrainConfig

CHUNK = 1_024
"""Items that are encoded at once where no gradient is asked for."""


def train_jointly(
    model: UserModel,
    encoder: CausalEncoder,
    texts: Sequence[str],
    dataset: Dataset,
    config: TrainConfig,
    *,
    validate: Validate | None = None,
    folder: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Trains a model and an item encoder in place and leaves both at the best validation score.

    Args:
        model: one whose items have vectors of the width of the encoder.
        encoder: what of it requires gradients is trained: all of it, or its low-rank adapters.
        texts: of the items of the catalogue, ``I``; one that is empty has a vector of zeros.
        dataset: training segments.
        config: settings, with a loss against drawn items; ``encoder_lr`` is the encoder's rate.
        validate, folder, resume, device: as in ``train``.

    Raises:
        ValueError: if texts or widths do not fit, or the loss is of all items.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    items = _items_of(model, encoder, texts)
    drawn = [name for name, loss in NEXT_ITEM_LOSSES.items() if loss.power is not None]
    if config.loss_for(model.num_items) not in drawn:
        raise ValueError(
            "the loss of all items would encode the catalogue for every micro-batch: expected loss "
            f"{' or '.join(drawn)}, received {config.loss!r}"
        )
    place = torch.device(device)
    model.to(place)
    encoder.to(place)
    task = JointNextItem(model, items, encoder, texts, dataset, config, place)

    def measured(trained: UserModel) -> Mapping[str, float]:
        items.refill(task.encoded())
        return {} if validate is None else validate(trained)

    items.fill(task.encoded())
    with attached(items, encoder):
        chosen = None if validate is None else measured
        result = run(task, config, validate=chosen, folder=folder, resume=resume)
    items.refill(task.encoded())
    return result


def _items_of(model: UserModel, encoder: CausalEncoder, texts: Sequence[str]) -> ItemVectors:
    items = item_vectors(model)
    if items is None or items.project is None:
        raise ValueError(
            "expected a model whose items have vectors, received one that knows them by their ids "
            f"alone; set vectors={encoder.width} in its architecture"
        )
    expected = (model.num_items, items.config.vectors)
    if (len(texts), encoder.width) != expected:
        raise ValueError(
            f"expected {expected[0]} texts and an encoder of width {expected[1]}, received "
            f"{len(texts)} and {encoder.width}"
        )
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(
            "expected an encoder of which something is trained, received one that is frozen; give "
            "its vectors to train() by encode_items"
        )
    if not any(text.strip() for text in texts):
        raise ValueError("expected texts, received none that is not empty; check the columns")
    return items


@contextmanager
def attached(items: ItemVectors, encoder: CausalEncoder) -> Iterator[None]:
    """Makes the encoder a part of the model: of its parameters and of its checkpoints."""
    items.encoder = encoder
    try:
        yield
    finally:
        del items.encoder


class JointNextItem(NextItem):
    """Predicting the next item by vectors that are computed as they are needed."""

    def __init__(
        self,
        model: UserModel,
        items: ItemVectors,
        encoder: CausalEncoder,
        texts: Sequence[str],
        dataset: Dataset,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        super().__init__(model, dataset, config, device)
        self.items, self.causal, self.encoder = items, encoder, encoder
        self.known = torch.tensor([bool(text.strip()) for text in texts])
        self.tokens = encoder.tokenize(texts)
        self._micro_batch = ExitStack()
        read = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        # what the run begins from: neither texts nor the encoder may be others when it goes on
        encoder.trained_from = encoder.trained_from or encoder.digest
        self.facts = {**self.facts, "given": read, "encoder": encoder.trained_from}

    def accumulate(self, batch: TrainBatch) -> tuple[float, int]:
        with self._micro_batch:
            return super().accumulate(batch)

    def prepare(self, events: Batch, negatives: Negatives | None) -> None:
        """Encodes the items of a micro-batch, with gradients, until the micro-batch is done."""
        drawn = events.items[:0] if negatives is None else negatives.items
        rows = torch.cat([events.items, drawn]).unique()  # type: ignore[no-untyped-call]
        rows = rows[self.known.to(rows.device)[rows]]
        if rows.numel():
            vectors = self.causal(self.tokens.select(rows.cpu()))
            self._micro_batch.enter_context(self.items.live(rows, vectors))

    @torch.no_grad()
    def encoded(self) -> Tensor:
        """Vectors ``[I, V]`` of the catalogue as the encoder stands."""
        training = self.causal.training
        self.causal.eval()
        vectors = torch.zeros_like(self.items.vectors)
        for rows in self.known.nonzero().flatten().split(CHUNK):  # type: ignore[no-untyped-call]
            found = self.causal(self.tokens.select(rows))
            vectors[rows.to(vectors.device)] = found.to(vectors)
        self.causal.train(training)
        return vectors
