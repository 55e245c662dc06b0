"""LRURec (Yue et al., WSDM 2024, arXiv 2310.02367): a diagonal linear recurrence over events.

State: the complex recurrent vector of every layer and the last output,
``4 (2 L H + D)`` bytes: 2,304 at the published sizes (L = 2, H = 128, D = 64).

All complex arithmetic is written in real numbers: a vector of H complex channels is planar,
H real parts and then H imaginary parts. Where paper and published code disagree, the line says
which one stands here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.batch import Batch
from everlong.models.item_vectors import ItemConfig, ItemVectors
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.ops.dropout import Dropout
from everlong.ops.linear_scan import linear_scan
from everlong.ops.lru_step import StepParameters, lru_step
from everlong.ops.product import linear


@dataclass(frozen=True, kw_only=True)
class LRUConfig(ItemConfig):
    """Architecture of LRURec; the defaults are the published sizes.

    Attributes:
        channels: complex channels H of the recurrence.
        layers: blocks of recurrence and feed-forward network.
        dropout: on embeddings and inside the feed-forward network.
        recurrence_dropout: on the output of the recurrence.
        min_radius, max_radius: moduli of the decays at initialisation. A channel of modulus r
            forgets half of an event after ln 2 / -ln r events: 69 at 0.99, 6,931 at 0.9999.
    """

    channels: int = 128
    layers: int = 2
    dropout: float = 0.2
    recurrence_dropout: float = 0.2
    min_radius: float = 0.8
    max_radius: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        if not 0.0 <= self.min_radius < self.max_radius < 1.0:
            raise ValueError(
                "the recurrence is stable for 0 <= min_radius < max_radius < 1, received "
                f"min_radius={self.min_radius}, max_radius={self.max_radius}"
            )


COMPILED_USERS = 32
"""Users up to which a step is one compiled loop; products of matrices are quicker for more."""


class LRUState(NamedTuple):
    """What LRURec remembers of a user."""

    hidden: Tensor  # [B, L, 2H]
    user: Tensor  # [B, D], the output after the last event


class LRU(UserModel[LRUState]):
    """LRURec on packed histories: parallel over events in training, one small step in serving."""

    recurrence_parameters = frozenset({"nu_log", "theta_log", "gamma_log"})
    weight_decay: ClassVar[Mapping[str, bool]] = {"start": True}

    def __init__(self, config: LRUConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.items = ItemVectors(config)
        # the published code learns the first item from the embedding of its padding row, an
        # implicit start token; here it is a parameter of its own and no padding class exists, so
        # the softmax runs over the I real items and not over I + 1 classes
        self.start = nn.Parameter(torch.empty(config.dim))
        self.item_bias = nn.Parameter(torch.empty(config.num_items))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(LRUBlock(config) for _ in range(config.layers))
        self._kept: tuple[object, StepParameters] | None = None
        self._initialise()

    def _initialise(self) -> None:
        # code: every parameter but norms and the recurrence, biases too (the paper is silent)
        for name, parameter in self.named_parameters():
            if "norm" not in name and "recurrence" not in name:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def initial_state(self, num_users: int) -> LRUState:
        """Zero recurrence, and the output of the start token."""
        config, dtype = self.config, self.start.dtype
        # one start token a user in training, so that each has its own dropout
        rows = num_users if self.training else min(num_users, 1)
        device = self.start.device
        hidden = torch.zeros(
            num_users, config.layers, 2 * config.channels, dtype=dtype, device=device
        )
        offsets = torch.arange(rows + 1, device=device)
        # the published mask keeps the start token out of the recurrence that follows it
        outputs, _ = self._run(self.start.expand(rows, -1), hidden[:rows], offsets)
        return LRUState(hidden, outputs.expand(num_users, -1).contiguous())

    def encode(self, events: Batch, state: LRUState | None = None) -> tuple[Tensor, LRUState]:
        """Outputs ``[N, D]`` after each event, and the final states."""
        if state is None:
            state = self.initial_state(events.num_users)
        outputs, hidden = self._run(self.items(events.items), state.hidden, events.offsets)
        busy = (events.lengths > 0).unsqueeze(-1)
        if events.num_events == 0:
            return outputs, LRUState(hidden, state.user)
        last = outputs[(events.offsets[1:] - 1).clamp(min=0)]
        return outputs, LRUState(hidden, torch.where(busy, last, state.user))

    def final_state(self, events: Batch, state: LRUState | None = None) -> LRUState:
        """The final states alone: past its recurrence the last block works on last events only."""
        if state is None:
            state = self.initial_state(events.num_users)
        values, finals = self._enter(self.items(events.items)), []
        *blocks, top = self.blocks
        for layer, block in enumerate(blocks):
            values, final = block(values, state.hidden[:, layer], events.offsets)
            finals.append(final)
        busy = (events.lengths > 0).nonzero()[:, 0]
        last = values[events.offsets[busy + 1] - 1]
        final = top.scan(values, state.hidden[:, -1], events.offsets)[1]  # type: ignore[operator]
        finals.append(final)
        newest = top.outputs(last, final[busy]).to(state.user.dtype)  # type: ignore[operator]
        user = state.user.index_copy(0, busy, newest)
        return LRUState(torch.stack(finals, dim=1), user)

    def step(self, events: Batch, state: LRUState) -> LRUState:
        """Reads one event of each user: ``2 L (4 D H + 4 D^2)`` multiply-adds, no scan."""
        values, finals = self._enter(self.items(events.items)), []
        if self._is_small(values, state):
            return self._compiled_step(values, state)
        for layer, block in enumerate(self.blocks):
            values, final = block.step(values, state.hidden[:, layer])  # type: ignore[operator]
            finals.append(final)
        return LRUState(torch.stack(finals, dim=1), values)

    def _is_small(self, values: Tensor, state: LRUState) -> bool:
        return (
            len(values) <= COMPILED_USERS
            and not (self.training or torch.is_grad_enabled())
            and values.is_cpu
            and values.dtype == state.hidden.dtype == torch.float32
        )

    def _compiled_step(self, values: Tensor, state: LRUState) -> LRUState:
        outputs = values.clone(memory_format=torch.contiguous_format)
        hidden = state.hidden.clone(memory_format=torch.contiguous_format)
        epsilon = np.float32(self.norm.eps)
        lru_step(outputs.numpy(), hidden.numpy(), self._step_parameters(), epsilon)
        return LRUState(hidden, outputs)

    def _step_parameters(self) -> StepParameters:
        """Made anew when a parameter has been written to."""
        # as ``parameters`` has them, which finds a name for each and takes longer than a step
        now = tuple(
            (id(one), one._version)
            for block in self.blocks
            for part in block._modules.values()
            for one in part._parameters.values()  # type: ignore[union-attr]
            if one is not None
        )
        if self._kept is None or self._kept[0] != now:
            fields = zip(*(block.step_parameters() for block in self.blocks), strict=True)  # type: ignore[operator]
            arrays = (torch.stack(values).contiguous().numpy() for values in fields)
            self._kept = now, StepParameters(*arrays)
        return self._kept[1]

    def _run(self, embedded: Tensor, hidden: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        values, finals = self._enter(embedded), []
        for layer, block in enumerate(self.blocks):
            values, final = block(values, hidden[:, layer], offsets)
            finals.append(final)
        return values, torch.stack(finals, dim=1)

    def _enter(self, embedded: Tensor) -> Tensor:
        # code: dropout stands before the norm; eq. 7 shows none
        values: Tensor = self.norm(self.dropout(embedded))
        return values

    def item_embeddings(self) -> ItemEmbeddings:
        """The item vectors, tied, and the item biases (section 3.4)."""
        return ItemEmbeddings(self.items.table(), self.item_bias)

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items, without the others."""
        return ItemEmbeddings(self.items(items), self.item_bias[items])


class LRUBlock(nn.Module):
    """A linear recurrence and a feed-forward network, each with residual and post-norm."""

    def __init__(self, config: LRUConfig) -> None:
        super().__init__()
        self.recurrence = Recurrence(config.channels, config.min_radius, config.max_radius)
        self.enter = nn.Linear(config.dim, 2 * config.channels)
        # code: the imaginary part of the output and its bias are never used, so neither exists here
        self.leave = nn.Linear(2 * config.channels, config.dim)
        self.recurrence_norm = nn.LayerNorm(config.dim)
        self.recurrence_dropout = Dropout(config.recurrence_dropout)
        self.widen = nn.Linear(config.dim, 4 * config.dim)
        self.narrow = nn.Linear(4 * config.dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, values: Tensor, hidden: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[N, D]`` and final recurrent states ``[B, 2H]`` from ``values [N, D]``."""
        states, final = self.scan(values, hidden, offsets)
        return self.outputs(values, states), final

    def scan(self, values: Tensor, hidden: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Recurrent states after each event ``[N, 2H]`` and of each user in the end ``[B, 2H]``."""
        decay, inputs = self._inputs(values)
        return linear_scan(inputs.to(hidden.dtype), decay, hidden, offsets)

    def step(self, values: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, D]`` and states ``[B, 2H]`` after one event each, ``values [B, D]``."""
        decay, inputs = self._inputs(values)
        (a, b), (re, im) = decay, hidden.chunk(2, dim=1)
        states = inputs.to(hidden.dtype) + torch.cat([a * re - b * im, a * im + b * re], dim=1)
        return self.outputs(values, states), states

    def step_parameters(self) -> tuple[Tensor, ...]:
        """The fields of ``StepParameters`` for this block."""
        decay, gamma = self.recurrence()
        norms = (self.recurrence_norm, self.ffn_norm)
        return (
            decay,
            (gamma.unsqueeze(-1) * self.enter.weight).T,
            gamma * self.enter.bias,
            self.leave.weight.T,
            self.leave.bias,
            self.widen.weight.T,
            self.widen.bias,
            self.narrow.weight.T,
            self.narrow.bias,
            torch.stack([torch.stack([norm.weight, norm.bias]) for norm in norms]),
        )

    def _inputs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Decays ``[2, H]`` and the scaled inputs of the recurrence ``[N, 2H]``."""
        # eq. 5; code: gamma scales the first event too, and the bias with it. Folded into the
        # product: gamma (W x + b) = (gamma W) x + gamma b
        decay, gamma = self.recurrence()
        weight = gamma.unsqueeze(-1) * self.enter.weight
        return decay, linear(values, weight, gamma * self.enter.bias)

    def outputs(self, values: Tensor, states: Tensor) -> Tensor:
        """Outputs ``[N, D]`` from the block's input and its recurrent states."""
        leave, widen, narrow = self.leave, self.widen, self.narrow
        mixed = self.recurrence_dropout(linear(states, leave.weight, leave.bias))
        values = self.recurrence_norm(mixed + values)
        # code: one GELU (eq. 8 has a second one outside)
        inner = self.dropout(functional.gelu(linear(values, widen.weight, widen.bias)))
        mixed = self.dropout(linear(inner, narrow.weight, narrow.bias))
        outputs: Tensor = self.ffn_norm(mixed + values)
        return outputs


class Recurrence(nn.Module):
    """The decays of the channels, eq. 5: ``exp(-exp(nu) + i exp(theta))``, and the input scale.

    ``nu``, ``theta`` and ``gamma`` are learned as logarithms; |decay| < 1 by construction.
    """

    def __init__(self, channels: int, min_radius: float, max_radius: float) -> None:
        super().__init__()
        # moduli uniform in r^2 between the radii, phases uniform on the whole circle
        area = torch.rand(channels) * (max_radius**2 - min_radius**2) + min_radius**2
        phase = 2 * math.pi * (1.0 - torch.rand(channels))
        self.nu_log = nn.Parameter((-0.5 * area.log()).log())
        self.theta_log = nn.Parameter(phase.log())
        # code: gamma starts at sqrt(1 - |decay|^2) and is learned on its own from there
        self.gamma_log = nn.Parameter(0.5 * torch.log1p(-area))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Decays ``[2, H]``, real and imaginary, and input scales ``[2H]``."""
        radius, phase = torch.exp(-self.nu_log.exp()), self.theta_log.exp()
        decay = torch.stack([radius * phase.cos(), radius * phase.sin()])
        return decay, self.gamma_log.exp().repeat(2)
