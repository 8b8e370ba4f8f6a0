"""Completions of a data set's prompts: drawn by an engine, judged, and kept in a journal."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from trl_ext_probing.engines import Completion, Draw, Engine
from trl_ext_probing.engines import engine as make_engine
from trl_ext_probing.journal import Journal
from trl_ext_probing.models import check_template, load_model, load_tokenizer
from trl_ext_probing.ranks import batched, from_first, shared_work, world_size
from trl_ext_probing.rewards import Judge
from trl_ext_probing.settings import SampledModelSettings, SamplingSettings


class SampledModel:
    """A model whose completions are drawn, which loads when it is first needed.

    Args:
        settings: Of the probe.
        name: Of the model.
    """

    def __init__(self, settings: SampledModelSettings, name: str) -> None:
        self.name = name
        self._settings = settings

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer in this process."""
        return load_model(self.name, self._settings.dtype, self._settings.device)

    @cached_property
    def _engine(self) -> Engine:
        settings = self._settings
        if settings.engine == "server":
            return make_engine("server", base_url=settings.base_url, model=self.name, concurrency=settings.batch_size)
        if settings.engine == "vllm":
            self.__dict__.pop("loaded", None)  # vLLM takes the memory of the device for itself
            gc.collect()
            return make_engine("vllm", model=self.name, dtype=settings.dtype)
        model, tokenizer = self.loaded
        return make_engine("transformers", model=model, tokenizer=tokenizer, batch_size=settings.batch_size)

    def engine(self) -> Engine:
        """The engine that the settings ask for, with the model."""
        return self._engine


def refuse_missing_templates(settings: SampledModelSettings, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse prompts of messages for models of this machine that cannot write them, before anything is drawn.

    Raises:
        ConfigurationError: A model has no chat template.
    """
    if settings.engine != "server" and any(not isinstance(row["prompt"], str) for row in rows):
        for model in settings.model:
            check_template(load_tokenizer(model), model, "prompt")


class Samples:
    """Judged completions by (row, sample), of which some may have been drawn before.

    Which completions there are depends on the settings alone; in which order they come into the journal does not.

    Args:
        rows: The problems.
        journal: Holds what is there, and takes what is added; None keeps nothing.

    Raises:
        ConfigurationError: A line of the journal is no sample, is of no row, or is there twice.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], journal: Journal | None = None) -> None:
        self.rows = rows
        self.held: dict[tuple[int, int], dict[str, Any]] = {}
        """`reward`, `tokens` (None where the engine does not tell) and `cut`, whether it reached the longest length."""
        self._journal = journal
        for number, line in enumerate(journal.lines if journal else []):
            if "sample" in line:
                self._check(number, line)
                self._keep(line)

    def _check(self, number: int, line: dict[str, Any]) -> None:
        assert self._journal is not None
        if not {"row", "sample", "reward", "tokens", "cut"} <= line.keys():
            raise self._journal.damaged(number, "is not a sample")
        if line["row"] not in range(len(self.rows)):
            raise self._journal.damaged(number, f"is a sample of row {line['row']}, which there is not")
        if (line["row"], line["sample"]) in self.held:
            raise self._journal.damaged(number, f"has sample {line['sample']} of row {line['row']} again")

    def rewards(self) -> list[list[float | None]]:
        """Of all completions of each row, in the order of their samples; None where no reward function applies."""
        found: list[list[float | None]] = [[] for _ in self.rows]
        for (row, _), line in sorted(self.held.items()):
            found[row].append(line["reward"])
        return found

    def draw(
        self, draws: Sequence[tuple[int, int]], engine: Callable[[], Engine], judge: Judge, settings: SamplingSettings
    ) -> Iterator[int]:
        """Draw and judge those of the draws that are not there yet.

        Args:
            draws: What is wanted.
            engine: Makes what draws, if there is anything to draw.
            judge: What judges.
            settings: How completions are drawn.

        Yields:
            How many of the draws are there.
        """
        missing = [draw for draw in draws if draw not in self.held]
        done = len(draws) - len(missing)
        yield done
        if not missing:
            return
        for batch in self._batches(missing, engine(), settings):
            lines = from_first(partial(self._judged, batch, judge))
            if self._journal is not None:
                self._journal.append(*lines)
            for line in lines:
                self._keep(line)
            done += len(lines)
            yield done

    def _batches(
        self, missing: Sequence[tuple[int, int]], engine: Engine, settings: SamplingSettings
    ) -> Iterator[list[Completion]]:
        """Completions as they come; on several processes those of a block of draws, which they share by prompt."""

        def drawn(draws: list[Draw]) -> Iterator[Completion]:
            return engine.generate(
                [row["prompt"] for row in self.rows],
                n=max(sample for _, sample in missing) + 1,
                draws=draws,
                max_tokens=settings.max_completion_length,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                seed=settings.seed,
            )

        draws = [Draw(*draw) for draw in missing]
        if world_size() == 1:
            yield from batched(drawn(draws), settings.batch_size)
        else:
            for block in batched(draws, 8 * settings.batch_size * world_size()):
                yield shared_work(block, drawn, attrgetter("prompt_index"))

    def _judged(self, batch: Sequence[Completion], judge: Judge) -> list[dict[str, Any]]:
        places = [completion.prompt_index for completion in batch]
        rewards = judge(
            [self.rows[i] for i in places], [c.text for c in batch], [c.token_ids or () for c in batch], places
        )
        return [
            {
                "row": c.prompt_index,
                "sample": c.sample_index,
                "reward": reward,
                "tokens": None if c.token_ids is None else len(c.token_ids),
                "cut": c.finish_reason == "length",
                "completion": c.text,
            }
            for c, reward in zip(batch, rewards, strict=True)
        ]

    def _keep(self, line: dict[str, Any]) -> None:
        self.held[line["row"], line["sample"]] = {name: line[name] for name in ("reward", "tokens", "cut")}
