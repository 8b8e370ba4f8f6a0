"""Named auxiliary data sets: drawn in a reproducible order, with an exact position, and their gradients.

A stream's order is a function of its seed and position alone: pass e over the n samples uses the permutation seeded by
(seed, e). Rank r of w takes its own part of each global batch of w x batch_size samples, so shards are disjoint and one
integer, the number of samples drawn by all ranks, is the whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from trl_ext.engine.columns import column_totals, over_ranks
from trl_ext.engine.context import RunContext
from trl_ext.engine.losses import per_token_loss, token_record
from trl_ext.engine.passes import ExtraPasses
from trl_ext.errors import ConfigurationError, StreamExhaustedError
from trl_ext.records import StreamGradient, StreamRequest


@dataclass(eq=False)
class Stream:
    """The batches of one auxiliary data set on one rank."""

    request: StreamRequest
    dataset: Dataset
    """Prepared samples with `input_ids` and `labels`."""
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    seed: int
    """Seed of the order."""
    rank: int
    world_size: int
    plugin: str = ""
    """Name of the plugin that asked."""
    position: int = 0
    """Samples drawn by all ranks."""
    _pass: tuple[int, Tensor] | None = None

    def __post_init__(self) -> None:
        request = self.request
        if self.exhausted:
            raise ConfigurationError(
                f"stream '{request.role}' has {len(self.dataset)} usable samples, fewer than one batch of "
                f"{request.batch_size} x {self.world_size} ranks, and on_exhausted='{request.on_exhausted}'; "
                "use on_exhausted='cycle', a smaller batch_size or more data"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples drawn in a step by all ranks."""
        return self.request.batch_size * self.world_size

    @property
    def exhausted(self) -> bool:
        """Whether the next batch would reach past the end of a stream that does not cycle."""
        left = len(self.dataset) - self.position
        return self.request.on_exhausted != "cycle" and left < self.global_batch_size

    def next_indices(self) -> list[int]:
        """Rows of this rank's next batch; moves the position.

        Raises:
            StreamExhaustedError: the stream does not cycle and has no full batch left.
        """
        if self.exhausted:
            raise StreamExhaustedError(
                f"stream '{self.request.role}' is exhausted after {self.position} of {len(self.dataset)} samples; "
                "give it more data, or ask for on_exhausted='cycle' or 'stop'"
            )
        start = self.position + self.rank * self.request.batch_size
        self.position += self.global_batch_size
        return [self._row(i) for i in range(start, start + self.request.batch_size)]

    def next_batch(self) -> dict[str, Tensor]:
        """This rank's next batch, on the CPU.

        Raises:
            IndexError: the plugin selected a row that there is not.
        """
        if self.request.select is None:
            return self.collate([self.dataset[i] for i in self.next_indices()])
        rows = list(self.request.select())
        if not rows:
            return self.empty_batch()
        if outside := [row for row in rows if not 0 <= row < len(self.dataset)]:
            raise IndexError(
                f"row {outside[0]} was asked of the stream '{self.request.role}', which has rows 0 to "
                f"{len(self.dataset) - 1}"
            )
        return self.collate([self.dataset[i] for i in rows])

    def empty_batch(self) -> dict[str, Tensor]:
        """A batch without labels: the other ranks may have some, so this one runs its forward and backward too."""
        batch = self.collate([self.dataset[0]])
        batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    def _row(self, i: int) -> int:
        n = len(self.dataset)
        epoch, offset = divmod(i, n)
        if not self.request.shuffle:
            return offset
        if self._pass is None or self._pass[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._pass = (epoch, torch.randperm(n, generator=generator))
        return int(self._pass[1][offset])

    def state_dict(self) -> dict[str, int]:
        """Position, and what it is a position in."""
        return {"position": self.position, "samples": len(self.dataset), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a position.

        Raises:
            ConfigurationError: the data set or seed is another one.
        """
        mine = self.state_dict()
        for key in ("samples", "seed"):
            if state[key] != mine[key]:
                raise ConfigurationError(
                    f"stream '{self.request.role}': the checkpoint was written with {key}={state[key]}, this run has "
                    f"{mine[key]}; give the same data and seed, or start afresh with reset_plugin_state=True"
                )
        self.position = state["position"]


def stream_gradient(run: RunContext, passes: ExtraPasses, model: nn.Module, stream: Stream) -> StreamGradient:
    """Draw the next batch and give the reduced gradient of its mean loss per label token. Collective.

    The loss is the objective of the `per_token_loss` plugin where one is active, plain NLL otherwise, plus the MoE
    balancing loss where the run uses it; divided by the label tokens of the batch over all ranks.
    """
    seed = stream.seed + (stream.position if stream.request.select is None else run.step())
    inputs = passes.to_device(_next_batch(run, stream))
    labels = inputs["labels"][:, 1:] != -100
    tokens = run.sum_over_ranks(labels.sum()).clamp(min=1)
    share = tokens / run.world_size
    totals = over_ranks(column_totals(inputs), run.sum_over_ranks)
    columns = {name: total / run.world_size for name, total in totals.items()}
    losses = torch.zeros(2, device=tokens.device)

    def loss() -> Tensor:
        with passes.sft_head():  # around the objective too, which may run the model for a reference
            out = passes.forward(model, inputs)
            record = token_record(run, out, inputs, share, columns, stream.request.role)
            total = per_token_loss(run, record).sum()
        losses.copy_(torch.stack([total.detach(), -out.log_probs.detach().sum()]))
        value = total / record.denominator
        if passes.router_aux_loss_coef:
            value = value + passes.router_aux_loss_coef * out.aux_loss
        return value

    with run.guard.named(f"{stream.plugin}.stream {stream.request.role}"):
        gradients = passes.gradient(model, loss, seed)
    mean_loss, nll = (run.guard.sum_over_ranks(losses) / tokens).tolist()
    return StreamGradient(gradients=gradients, nll=nll, loss=mean_loss, tokens=int(tokens))


def _next_batch(run: RunContext, stream: Stream) -> dict[str, Tensor]:
    if stream.request.select is None:
        return stream.next_batch()  # fails on all ranks alike
    # The rows are the plugin's choice, by this rank's data.
    chosen: dict[str, Tensor] | None = run.guard.run("streams", stream.plugin, stream.next_batch, None)
    run.guard.agree()
    return stream.empty_batch() if chosen is None else chosen
