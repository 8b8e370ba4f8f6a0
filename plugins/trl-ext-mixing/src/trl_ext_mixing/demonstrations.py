"""Demonstrations of the very prompts that were rolled out, read from a column of the GRPO data set.

Streams draw rows in an order of their own, so the demonstrations of given prompts need a forward of their own here:
plain log-likelihood at temperature 1, on one device or under DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from trl_ext.errors import ConfigurationError
from trl_ext.gradients import GradientView
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext, StreamGradient


@dataclass(frozen=True)
class Demonstration:
    """One tokenized demonstration: labels are `ids[start:]`."""

    ids: list[int]
    start: int

    @property
    def tokens(self) -> int:
        """Label tokens."""
        return len(self.ids) - self.start


def refuse_unsupported(run: RunDescription, column: str, setting: str) -> None:
    """Raise where demonstrations of the rolled-out prompts cannot be had.

    Raises:
        ConfigurationError: sharded parameters, or no such column in the training data.
    """
    if run.sharding not in ("none", "ddp"):
        raise ConfigurationError(
            f"{setting} runs a forward outside of the trainer's, which sharded parameters ({run.sharding}) do not "
            "allow; use DDP, or give the demonstrations as the stream 'sft'"
        )
    if run.columns and column not in run.columns:
        raise ConfigurationError(
            f"{setting}: the training data has no column {column!r}; there are {', '.join(run.columns)}"
        )


def refuse_split_generations(run: RunDescription) -> None:
    """Raise where a generation batch serves more than one optimiser step: its prompts would be counted in each.

    Raises:
        ConfigurationError: naming the settings.
    """
    args = run.args
    if args.num_iterations > 1 or args.steps_per_generation != args.gradient_accumulation_steps:
        raise ConfigurationError(
            f"a generation batch has to be one optimiser step, but num_iterations={args.num_iterations} and "
            f"steps_per_generation={args.steps_per_generation} with gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}; set num_iterations=1 and leave steps_per_generation out"
        )


def first_rows(rollouts: Rollouts, rewards: Rewards) -> list[tuple[int, Any]]:
    """Number and row of each prompt whose group begins on this rank, so that each counts once over all ranks."""
    numbered = enumerate(rollouts.inputs, rewards.local.start)
    size = rollouts.num_generations
    return [(i // size, row) for i, row in numbered if i % size == 0]


class Demonstrations:
    """Finds, tokenizes and scores demonstrations.

    Args:
        context: of the run.
        column: column of the training data: text, or messages, that answers the row's `prompt`.
        max_length: longest sequence in tokens, cut at the end; not cut where None.
    """

    def __init__(self, context: SetupContext, column: str, max_length: int | None) -> None:
        self.context = context
        self.column = column
        self.max_length = max_length
        self.tokenizer = getattr(context.tokenizer, "tokenizer", context.tokenizer)

    def of_prompts(self, rollouts: Rollouts, rewards: Rewards) -> dict[int, Demonstration]:
        """Prompt number (over all ranks) to demonstration, for the groups that begin on this rank.

        Raises:
            ValueError: a row without a demonstration, or one that leaves no label.
        """
        return {prompt: self.encode(row) for prompt, row in first_rows(rollouts, rewards)}

    def encode(self, row: Any) -> Demonstration:
        """Tokenize one row as TRL's SFT does: prompt, completion, end of sequence; labels on the completion."""
        prompt, answer = row["prompt"], row.get(self.column)
        if not answer:
            raise ValueError(f"column {self.column!r} is empty for the prompt {prompt!r}")
        if isinstance(prompt, str):
            head = self.tokenizer(prompt)["input_ids"]
            ids = self.tokenizer(prompt + answer + (self.tokenizer.eos_token or ""))["input_ids"]
        else:
            reply = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            template = self.tokenizer.apply_chat_template
            head = template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
            ids = template([*prompt, *reply], tokenize=True, return_dict=True)["input_ids"]
        cut = Demonstration(list(ids[: self.max_length]), len(head))
        if cut.tokens < 1:
            raise ValueError(f"max_length={self.max_length} leaves no label of the demonstration of {prompt!r}")
        return cut

    def nll_sum(self, demonstrations: Sequence[Demonstration]) -> Tensor:
        """() float, differentiable: negative log-likelihood summed over the label tokens of a batch."""
        device = self.context.device
        width = max(len(d.ids) for d in demonstrations)
        ids = torch.zeros(len(demonstrations), width, dtype=torch.long)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, d in enumerate(demonstrations):
            ids[i, : len(d.ids)] = torch.tensor(d.ids)
            attention[i, : len(d.ids)] = 1
            labels[i, d.start : len(d.ids)] = torch.tensor(d.ids[d.start :])
        # Without `fused_lm_head` TRL's head is the model's own: GRPO's divides by the sampling temperature.
        output = self.context.model(input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False)
        logits, labels = output.logits[:, :-1], labels[:, 1:].to(device)
        mask = labels != -100
        scores = logits[mask]
        return cross_entropy(scores if scores.dtype == torch.float64 else scores.float(), labels[mask], reduction="sum")

    def gradient(self, demonstrations: Sequence[Demonstration], batch_size: int) -> StreamGradient:
        """The gradient of the mean log-likelihood loss per label token over all ranks. Collective.

        Args:
            demonstrations: of this rank; may be empty.
            batch_size: samples per forward.
        """
        parameters = self.context.weights.parameters
        sums = [torch.zeros_like(p) for p in parameters]
        totals = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(demonstrations), batch_size):
            batch = demonstrations[start : start + batch_size]
            loss = self.nll_sum(batch)
            # `autograd.grad` on the unwrapped model: DDP reduces nothing, so ranks may run different numbers of passes.
            parts = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:
                    total += part
            totals += torch.tensor([float(loss.detach()), sum(d.tokens for d in batch)], dtype=torch.float64)
        self.reduce(totals)
        for total in sums:
            self.reduce(total)
        tokens = max(int(totals[1]), 1)
        torch._foreach_div_(sums, float(tokens))
        nll = float(totals[0]) / tokens
        view = GradientView(self.context.weights.names, parameters, sums)
        return StreamGradient(gradients=view, nll=nll, loss=nll, tokens=int(totals[1]))

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank must call this alike."""
        if self.context.world_size > 1:
            on_device = tensor.to(self.context.device)  # NCCL reduces what is on the GPU only
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor
