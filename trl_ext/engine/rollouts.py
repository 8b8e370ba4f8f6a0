"""A generation batch: its completions and rewards as plugins see them, and as a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from trl_ext.checkpoints import State
from trl_ext.engine.context import RunContext
from trl_ext.engine.finite_rewards import refuse_non_finite_advantages
from trl_ext.engine.grpo_loss import loss_mask
from trl_ext.own_passes import preserved_random_state
from trl_ext.records import Column, Rewards, Rollouts

_PREFIX = "rollouts"


def shaped_advantages(
    run: RunContext,
    output: Mapping[str, Any],
    rows: Mapping[str, Any],
    rewards: Rewards,
    num_generations: int,
    columns: Sequence[Column],
    *,
    finite: bool,
    per_token: bool,
    entropy: Tensor | None = None,
) -> Tensor:
    """The advantages of this rank's completions, as the `advantages` hooks leave them. Collective.

    `output` is what TRL's `_generate_and_score_completions` returns, `rows` its inputs, prompts and completions;
    `columns` are those that plugins want of the prompts, `finite` says whether a plugin that returns NaN or infinity
    fails, `per_token` whether it may give one advantage per token; `entropy` (N, T) is there where a plugin wants it.

    Returns:
        (N,) float, or (N, T).
    """
    of_prompts: dict[str, Tensor] = {}
    if columns:  # streamed rows were not looked at before: what is wrong with one on this rank has to reach the others
        of_rows = partial(_of_rows, columns, rows["inputs"], run.device)
        of_prompts = run.guard.run("advantages", run.plugins.calls("advantages")[0][0], of_rows, of_prompts)
    rollouts = Rollouts(
        **rows,
        prompt_ids=output["prompt_ids"],
        prompt_mask=output["prompt_mask"],
        completion_ids=output["completion_ids"],
        mask=loss_mask(output),
        num_generations=num_generations,
        step=run.step(),
        training=run.training(),
        old_log_probs=output.get("old_per_token_logps"),
        columns=of_prompts,
        entropy=entropy,
    )
    shapes = [(len(rows["prompts"]),), *([tuple(rollouts.mask.shape)] if per_token else [])]

    def check(result: Any) -> None:
        if not isinstance(result, Tensor) or tuple(result.shape) not in shapes:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(f"returned {got}; expected advantages of shape {' or '.join(map(str, shapes))}")
        if finite:
            refuse_non_finite_advantages(result)

    given: Tensor = output["advantages"]
    shaped = run.guard.chain("advantages", "advantages", given, check, rollouts=rollouts, rewards=rewards)
    run.guard.agree()  # what follows is collective: streams, the loss of sharded weights
    return shaped


class OldEntropy:
    """The entropy of each next-token distribution of the completions, under the policy that the update starts from.

    It comes with the old log-probabilities, where TRL's forward computes them, and else of one more forward.
    """

    _scoring = False
    _entropy: Tensor | None = None

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Around TRL's scoring of completions: note the entropy of its first forward."""
        self._scoring, self._entropy = True, None
        try:
            yield
        finally:
            self._scoring = False

    def log_probs(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's `_get_per_token_logps_and_entropies`, `forward`."""
        if not self._scoring or self._entropy is not None:
            return forward(*args, **kwargs)
        log_probs, self._entropy, aux_loss = forward(*args, **{**kwargs, "compute_entropy": True})
        return log_probs, None, aux_loss

    def of(self, output: Mapping[str, Any], forward: Callable[..., Any], model: nn.Module, batch_size: int) -> Tensor:
        """(N, T) float, in nats. Collective where the model is sharded.

        Args:
            output: What TRL's `_generate_and_score_completions` returned inside of `scoring`.
            forward: TRL's `_get_per_token_logps_and_entropies`.
            model: The policy, as TRL scores with it.
            batch_size: Rows of one forward.
        """
        if output.get("old_per_token_logps", output.get("old_logps")) is not None:  # GRPO's, or RLOO's per completion
            assert self._entropy is not None, "noted with the old log-probabilities"
            return self._entropy
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attended = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        names = signature(forward).parameters.keys() & output.keys()  # of images
        others = {name: output[name] for name in names}
        with torch.no_grad(), preserved_random_state(ids.device):
            kept = output["completion_ids"].size(1)
            _, entropy, _ = forward(model, ids, attended, kept, batch_size, compute_entropy=True, **others)
        return cast("Tensor", entropy)


def _of_rows(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """(N,) float or long each."""
    return {
        column.name: torch.tensor([column.encode(row.get(column.name)) for row in rows], device=device)
        for column in columns
    }


def per_completion(advantages: Tensor, output: Mapping[str, Any]) -> Tensor:
    """(N,) float: the advantages as one number a completion, the mean over the tokens that the loss sees.

    Args:
        advantages: (N,) or (N, T) float.
        output: What TRL's `_generate_and_score_completions` returns.
    """
    if advantages.dim() == 1:
        return advantages
    mask = loss_mask(output).bool()
    return torch.where(mask, advantages, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def window_batches(
    buffer: Sequence[dict[str, Any]], micro_step: int, done: int, accumulation_steps: int, num_iterations: int
) -> list[dict[str, Any]] | None:
    """Give the micro-batches of the current accumulation window; None where some of them are still to be generated.

    Args:
        buffer: TRL's slices of the last generation batch, of which each micro-step takes the next, round and round.
        micro_step: TRL's count of the run's micro-steps, from 0.
        done: micro-steps of the window already done.
        accumulation_steps: micro-steps of the window.
        num_iterations: how often TRL goes through the buffer before it generates again.
    """
    first, period = micro_step - done, len(buffer) * num_iterations
    last = first + accumulation_steps - 1
    if first // period != last // period:
        return None
    return [buffer[i % len(buffer)] for i in range(first, last + 1)]


def pack(buffer: Sequence[Mapping[str, Any]] | None) -> State:
    """The rollouts still to be trained on, flat: TRL does not save them, and a run resumed amid them would differ."""
    return {
        f"{_PREFIX}.{i}.{key}": value
        for i, batch in enumerate(buffer or ())
        for key, value in batch.items()
        if value is not None
    }


def changed_schedule(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Where the schedule that rollouts were drawn for differs from the one at hand, in words; empty if nowhere."""
    names = [name for name in now if saved.get(name) != now[name]]
    return ", ".join(f"{name} is {now[name]} and was {saved.get(name)}" for name in names)


def unpack(state: State, to_device: Callable[[Any], Any]) -> list[dict[str, Any]] | None:
    """The reverse of `pack`, out of a state with other names in it too; None where it holds no rollouts."""
    batches: dict[int, dict[str, Any]] = {}
    for name, value in state.items():
        if name.startswith(f"{_PREFIX}."):
            _, i, key = name.split(".", 2)
            batches.setdefault(int(i), {})[key] = to_device(value)
    return [batches[i] for i in sorted(batches)] or None
