"""Demonstrations of the very prompts that were rolled out, read from a column of the GRPO data set.

Streams draw rows in an order of their own, so the demonstrations of given prompts need a forward of their own here:
plain log-likelihood at temperature 1, on one device or under DDP.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl_ext_probing.encoding import prompt_and_completion_ids

from trl_ext.gradients import GradientView
from trl_ext.ranks import on_every_rank
from trl_ext.records import Rewards, Rollouts, SetupContext, StreamGradient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demonstration:
    """One tokenized demonstration: labels are `ids[start:]`."""

    ids: list[int]
    start: int

    @property
    def tokens(self) -> int:
        """Label tokens."""
        return len(self.ids) - self.start


def group_starts(rollouts: Rollouts, rewards: Rewards) -> list[tuple[int, int]]:
    """Prompt number over all ranks, and row on this rank, of each group that begins here: so a prompt counts once."""
    first, size = rewards.local.start, rollouts.num_generations
    return [((first + i) // size, i) for i in range(len(rollouts.prompts)) if (first + i) % size == 0]


class Demonstrations:
    """Finds, tokenizes and scores demonstrations.

    Args:
        context: of the run.
        column: column of the training data: text, or messages, that answers the row's `prompt`.
        max_length: longest sequence in tokens, cut at the end; not cut where None.
        template: options of the chat template, as the prompts of the rollouts have them (`chat_template_kwargs`).
    """

    def __init__(
        self, context: SetupContext, column: str, max_length: int | None, template: Mapping[str, Any] | None = None
    ) -> None:
        self.context = context
        self.column = column
        self.max_length = max_length
        self.template = dict(template or {})
        self.tokenizer = getattr(context.tokenizer, "tokenizer", context.tokenizer)
        self.dropped = 0
        """Demonstrations on this rank, since the run began or was resumed, of which `max_length` left no label."""
        self._warned = False

    def of_prompts(
        self, rollouts: Rollouts, rewards: Rewards, wanted: Tensor | None = None
    ) -> dict[int, Demonstration]:
        """Prompt number (over all ranks) to demonstration, for the groups that begin on this rank. Collective.

        Args:
            wanted: (prompts of all ranks,) bool; the others need no demonstration. All where None.

        Raises:
            ValueError: a row without a demonstration.
        """
        chosen = None if wanted is None else wanted.tolist()

        def find() -> dict[int, Demonstration]:
            found = {}
            for number, i in group_starts(rollouts, rewards):
                if chosen is None or chosen[number]:
                    demonstration, head = self.encode(rollouts.prompts[i], rollouts.inputs[i])
                    if not self._warned:
                        self._compare_prompts(head, rollouts.prompt_ids[i][rollouts.prompt_mask[i].bool()].tolist())
                    if demonstration is None:
                        self.dropped += 1
                    else:
                        found[number] = demonstration
            return found

        return on_every_rank(find)

    def encode(self, prompt: Any, row: Mapping[str, Any]) -> tuple[Demonstration | None, list[int]]:
        """Tokenize one row as TRL's SFT does: prompt, completion, end of sequence.

        Returns:
            the demonstration, None where `max_length` leaves no label; and the ids of the prompt alone.
        """
        answer = row.get(self.column)
        if not answer:
            raise ValueError(f"column {self.column!r} is empty for the prompt {prompt!r}")
        if isinstance(prompt, str):
            if not isinstance(answer, str):
                raise ValueError(f"column {self.column!r} holds messages, but the prompt is text: {prompt!r}")
        elif isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        tools = row.get("tools")
        template = {
            **self.template,
            **(row.get("chat_template_kwargs") or {}),
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
        }
        ids, head, start = prompt_and_completion_ids(self.tokenizer, prompt, answer, **template)
        cut = Demonstration(ids[: self.max_length], start)
        return (cut if cut.tokens > 0 else None), head

    def _compare_prompts(self, mine: list[int], rolled_out: list[int]) -> None:
        if mine != rolled_out:
            self._warned = True
            logger.warning(
                "the prompt of a demonstration is tokenized otherwise than the one that was rolled out, so SFT and RL "
                "have different contexts; are there tools, which demonstrations need in a column `tools`? "
                "Demonstration: %r. Rolled out: %r",
                self.tokenizer.decode(mine),
                self.tokenizer.decode(rolled_out),
            )

    def nll_sum(self, demonstrations: Sequence[Demonstration]) -> Tensor:
        """Loss () float, differentiable: -sum log p over the label tokens of a batch, at temperature 1.

        It is a numerator: the caller divides it by the label tokens of all batches and ranks, so that the mean is over
        tokens and not over demonstrations. Of no demonstrations it is 0, by a forward of a row without labels.
        """
        device = self.context.device
        width = max((len(d.ids) for d in demonstrations), default=2)
        ids = torch.zeros(max(len(demonstrations), 1), width, dtype=torch.long)
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
        """The gradient of the SFT loss -1/T sum log p, T being the label tokens over all ranks. Collective.

        Args:
            demonstrations: of this rank; may be empty.
            batch_size: samples per forward.
        """
        parameters = self.context.weights.parameters
        sums = [torch.zeros_like(p) for p in parameters]
        losses = []
        for start in range(0, len(demonstrations), batch_size):
            batch = demonstrations[start : start + batch_size]
            loss = self.nll_sum(batch)
            # `autograd.grad` on the unwrapped model: DDP reduces nothing, so ranks may run different numbers of passes.
            parts = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:
                    total += part
            losses.append(loss.detach())
        nll = torch.stack(losses).cpu().double().sum() if losses else torch.zeros((), dtype=torch.float64)
        totals = self.reduce(torch.stack([nll, nll.new_tensor(sum(d.tokens for d in demonstrations))]))
        for total in sums:
            self.reduce(total)
        tokens = max(int(totals[1]), 1)
        torch._foreach_div_(sums, float(tokens))
        mean = float(totals[0]) / tokens
        view = GradientView(self.context.weights.names, parameters, sums)
        return StreamGradient(gradients=view, nll=mean, loss=mean, tokens=int(totals[1]))

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; every rank must call this alike."""
        if self.context.world_size > 1:
            on_device = tensor.to(self.context.device)  # NCCL reduces what is on the GPU only
            dist.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor
