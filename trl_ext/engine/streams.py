"""Named auxiliary data sets: prepared like the trainer's own, drawn in a reproducible order, with an exact position.

A stream's order is a function of its seed and position alone: pass e over the n samples uses the permutation seeded by
(seed, e). Rank r of w takes its own part of each global batch of w x batch_size samples, so shards are disjoint and one
integer, the number of samples drawn by all ranks, is the whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer

from trl_ext.engine.losses import token_record
from trl_ext.engine.passes import fused_forward, gradient_of
from trl_ext.errors import ConfigurationError, StreamExhaustedError
from trl_ext.records import StreamGradient, StreamRequest

if TYPE_CHECKING:
    from trl_ext.trainers.mixin import TrainerMixin


class Stream:
    """The batches of one auxiliary data set on one rank.

    Args:
        request: what the plugin asked for.
        dataset: prepared samples with `input_ids` and `labels`.
        collate: makes a batch of a list of samples.
        seed: seed of the order.
        rank, world_size: this rank's part.
        plugin: name of the plugin that asked.
    """

    def __init__(
        self,
        request: StreamRequest,
        dataset: Dataset,
        collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        seed: int,
        rank: int,
        world_size: int,
        plugin: str = "",
    ) -> None:
        self.plugin = plugin
        self.request = request
        self.dataset = dataset
        self.collate = collate
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._pass: tuple[int, Tensor] | None = None
        if request.on_exhausted != "cycle" and len(dataset) < self.global_batch_size:
            raise ConfigurationError(
                f"stream '{request.role}' has {len(dataset)} usable samples, fewer than one batch of "
                f"{request.batch_size} x {world_size} ranks, and on_exhausted='{request.on_exhausted}'; "
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


def prepare_stream(trainer: TrainerMixin, plugin: str, request: StreamRequest, dataset: Any) -> Stream:
    """Tokenize a data set as TRL's SFT would, with labels on the completion where there is one.

    Works in GRPO too: TRL's preparation needs only a tokenizer, a template and a few options. Messages go through the
    template with GRPO's `chat_template_kwargs`, as the prompts of the rollouts do, and with those of a column.

    Raises:
        ConfigurationError: a streaming or empty data set, or one with images.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"stream '{request.role}' is a {type(dataset).__name__}; streams need a `datasets.Dataset` with random "
            "access, since they shuffle and resume by position"
        )
    if len(dataset) == 0:
        raise ConfigurationError(f"stream '{request.role}' is empty")
    if images := sorted({"image", "images"}.intersection(dataset.column_names)):
        raise ConfigurationError(
            f"stream '{request.role}' has a column {images[0]!r}, but streams are of text alone; remove the column to "
            "train on the text without its images"
        )
    args = trainer.args
    if of_run := getattr(args, "chat_template_kwargs", None):
        of_rows = (
            dataset["chat_template_kwargs"] if "chat_template_kwargs" in dataset.column_names else [{}] * len(dataset)
        )
        merged = [{**of_run, **(of_row or {})} for of_row in of_rows]
        kept = [name for name in dataset.column_names if name != "chat_template_kwargs"]
        dataset = dataset.select_columns(kept).add_column("chat_template_kwargs", merged)
    max_length = request.max_length if request.max_length is not None else getattr(args, "max_length", None)
    # A namespace, not an SFTConfig: building one inside a live trainer resets accelerate's state.
    options = SimpleNamespace(
        dataset_num_proc=getattr(args, "dataset_num_proc", None),
        dataset_text_field=getattr(args, "dataset_text_field", "text"),
        assistant_only_loss=getattr(args, "assistant_only_loss", False) and "messages" in dataset.column_names,
        max_length=max_length,
        truncation_mode=getattr(args, "truncation_mode", "keep_start"),
        shuffle_dataset=False,
        seed=args.seed,
    )
    has_completion = "prompt" in dataset.column_names and "completion" in dataset.column_names
    wanted = getattr(args, "completion_only_loss", None)
    shim = SimpleNamespace(
        _tokenizer=trainer._tokenizer,
        chat_template=getattr(trainer, "chat_template", None) if options.assistant_only_loss else None,
        completion_only_loss=has_completion if wanted is None else wanted,
    )
    prepared = TrlSFTTrainer._prepare_dataset(
        shim, dataset, trainer.processing_class, options, False, None, f"stream '{request.role}'"
    )
    if len(prepared) == 0:
        raise ConfigurationError(f"stream '{request.role}' has no sample with a label left after preparation")
    prepared = prepared.select_columns(["input_ids", "labels"])
    collate = DataCollatorForLanguageModeling(
        pad_token_id=trainer._tokenizer.pad_token_id, padding_free=getattr(trainer, "padding_free", False)
    )
    default_seed = args.data_seed if args.data_seed is not None else args.seed
    seed = default_seed if request.seed is None else request.seed
    return Stream(request, prepared, collate, seed, args.process_index, args.world_size, plugin)


def stream_gradient(trainer: TrainerMixin, model: nn.Module, stream: Stream) -> StreamGradient:
    """Draw the next batch and give the reduced gradient of its mean loss per label token. Collective.

    The loss is the objective of the `per_token_loss` plugin where one is active, plain NLL otherwise, plus the MoE
    balancing loss where the trainer uses it; divided by the label tokens of the batch over all ranks.
    """
    seed = stream.seed + stream.position
    if stream.request.select is None:
        batch = stream.next_batch()  # fails on all ranks alike
    else:
        # The rows are the plugin's choice, by this rank's data.
        chosen: dict[str, Tensor] | None = trainer.ext_guard.run("streams", stream.plugin, stream.next_batch, None)
        trainer.ext_guard.agree()
        batch = stream.empty_batch() if chosen is None else chosen
    inputs = trainer.ext_to_device(batch)
    labels = inputs["labels"][:, 1:] != -100
    world = trainer.accelerator.num_processes
    tokens = trainer.accelerator.reduce(labels.sum(), reduction="sum").clamp(min=1)
    totals = torch.zeros(2, device=tokens.device)

    def loss() -> Tensor:
        with trainer.ext_sft_head():
            out = fused_forward(trainer, model, inputs)
        record = token_record(trainer, out, inputs, tokens / world, stream.request.role)
        per_token = trainer.ext_per_token_loss(record)
        total = per_token.sum()
        totals.copy_(torch.stack([total.detach(), -out.log_probs.detach().sum()]))
        value = total / record.denominator
        if trainer.aux_loss_enabled:
            value = value + trainer.router_aux_loss_coef * out.aux_loss
        return value

    gradients = gradient_of(trainer, model, loss, seed)
    mean_loss, nll = (trainer.accelerator.reduce(totals, reduction="sum") / tokens).tolist()
    return StreamGradient(gradients=gradients, nll=nll, loss=mean_loss, tokens=int(tokens))


def match_streams(
    requests: Mapping[str, list[StreamRequest]], datasets: Mapping[str, Any]
) -> dict[str, tuple[str, StreamRequest, Any]]:
    """Pair what plugins ask for with the data sets given, by role: the plugin that asks first, its request, the data.

    Args:
        requests: plugin name to its requests.
        datasets: role to data set.

    Raises:
        ConfigurationError: a role without data, data that no plugin asks for, or two different requests for a role.
    """
    matched: dict[str, tuple[str, StreamRequest, Any]] = {}
    for plugin, wanted in requests.items():
        for request in wanted:
            if request.role not in datasets:
                if request.optional:
                    continue
                given = ", ".join(sorted(datasets)) or "none"
                raise ConfigurationError(
                    f"plugin '{plugin}' needs an auxiliary data set for the role '{request.role}' (given: {given}); "
                    f"add `streams: {{{request.role}: path/to/data.jsonl}}` to the config, or pass "
                    f"`streams={{'{request.role}': dataset}}` to the trainer"
                )
            known = matched.get(request.role)
            if known is None:
                matched[request.role] = (plugin, request, datasets[request.role])
            elif known[1] != request:
                raise ConfigurationError(
                    f"two plugins ask for the stream '{request.role}' in different ways: {known[1]} and {request}"
                )
    unused = sorted(set(datasets) - set(matched))
    if unused:
        asked = ", ".join(sorted(matched)) or "none"
        raise ConfigurationError(
            f"no active plugin uses the stream(s) {', '.join(unused)} (roles asked for: {asked}); "
            "remove them from `streams`, or activate the plugin that reads them"
        )
    return matched
