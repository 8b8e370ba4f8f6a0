"""Fresh rollouts of the current policy on held-out prompts, without a trace in the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl_ext_probing.encoding import prompt_ids
from trl_ext_probing.engines import engine
from trl_ext_probing.functions import load_function
from trl_ext_probing.rewards import Judge

from trl_ext.data import load_dataset_spec
from trl_ext.own_passes import inference_only
from trl_ext.records import SetupContext


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, and what judges completions of them."""

    rows: Dataset
    judge: Judge

    @classmethod
    def load(cls, prompts: str, reward: str, per_step: int, world_size: int) -> HeldOut:
        """Read both from what a config says.

        Args:
            prompts: file, folder or hub id, of which the split "train" is taken.
            reward: function of TRL's form, `package.module:function` or `file.py:function`.
            per_step: prompts that each of `world_size` ranks takes in one go.
            world_size: number of ranks.

        Raises:
            ValueError: one cannot be loaded, there is no column `prompt` or one that the reward needs, or there are too
                few rows.
        """
        rows = load_dataset_spec({"path": prompts}, "prompts")
        if "prompt" not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise ValueError(f"prompts={prompts} has no column 'prompt' ({there}); rename one to it")
        if len(rows) < per_step * world_size:
            raise ValueError(
                f"prompts={prompts} has {len(rows)} rows, fewer than prompts_per_step={per_step} on {world_size} "
                "rank(s); lower prompts_per_step"
            )
        return cls(rows, Judge({reward: load_function(reward, "reward")}, rows.column_names))


@dataclass(frozen=True)
class FreshRollouts:
    """Judged completions of held-out prompts, those of a prompt one after the other. N rows."""

    prompt_ids: Tensor
    """(N, P) long, padded on the left."""
    prompt_mask: Tensor
    """(N, P) 0/1."""
    completion_ids: Tensor
    """(N, T) long, padded on the right."""
    mask: Tensor
    """(N, T) 0/1: the completion's tokens, up to and with the one that ends it."""
    rewards: Tensor
    """(N,) float."""


def roll_out(
    context: SetupContext, held_out: HeldOut, places: Sequence[int], generations: int, args: Any, seed: int
) -> FreshRollouts:
    """Sample completions as the trainer's settings have them, and judge them.

    Neither a random state nor a module's mode is another one afterwards: the noise of a draw depends on the seed, the
    prompt and the number of the sample alone.

    Args:
        context: the model and its tokenizer.
        held_out: prompts and judge.
        places: rows of the prompts.
        generations: completions per prompt.
        args: of the trainer.
        seed: of the sampling.

    Raises:
        ValueError: a prompt has no tokens or no chat template, or a reward is not a finite number.
    """
    rows = held_out.rows.select(places).to_list()
    drawer = engine(
        "transformers", model=context.model, tokenizer=context.tokenizer, batch_size=len(rows) * generations
    )
    with inference_only(context.model):
        drawn = drawer.generate(
            [row["prompt"] for row in rows],
            n=generations,
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=seed,
        )
        completions = sorted(drawn, key=lambda one: (one.prompt_index, one.sample_index))
    tokens = [one.token_ids or () for one in completions]
    prompted = [rows[one.prompt_index] for one in completions]
    rewards = held_out.judge(prompted, [one.text for one in completions], tokens)
    if None in rewards:
        row = places[completions[rewards.index(None)].prompt_index]
        raise ValueError(f"reward {held_out.judge.name} gave None for row {row} of prompts; leave such rows out")
    heads = [prompt_ids(context.tokenizer, row["prompt"]) for row in rows]
    return FreshRollouts(
        *_padded([heads[one.prompt_index] for one in completions], "left", context.device),
        *_padded(tokens, "right", context.device),
        torch.tensor(rewards, device=context.device),
    )


def _padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, longest) long each: the ids, 0 where there is none, and the mask."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = [
        pad_sequence(part, batch_first=True, padding_side=side).to(device)
        for part in (ids, [torch.ones_like(row) for row in ids])
    ]
    return padded[0], padded[1]
