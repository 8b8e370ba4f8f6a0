"""What a server does not do though it was asked to: said once, since it answers without a word."""

from __future__ import annotations

import logging

from trl_ext_probing.engines.interface import Completion, SamplingSettings

logger = logging.getLogger(__name__)

ENOUGH = 16
"""Comparisons with the first sample of a prompt until only equal ones are no chance any more."""
DO_SAMPLE = "`transformers serve` samples only where the model's generation_config.json says do_sample"


class Disregard:
    """Watches the completions of one run for parameters that do not show in them.

    Args:
        settings: What the server was asked for.
    """

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self._first: dict[int, str] = {}
        self._compared = self._different = 0
        self._said: set[str] = set()

    def note(self, completion: Completion, tokens: int | None) -> None:
        """Look at one more completion, and at the number of its tokens where the server tells."""
        if tokens is not None and tokens > self.settings.max_tokens:
            self._say("max_tokens", f"a completion has {tokens} tokens")
        if completion.prompt_index in self._first:
            self._compared += 1
            self._different += completion.text != self._first[completion.prompt_index]
        self._first.setdefault(completion.prompt_index, completion.text)
        if self.settings.temperature and self._compared >= ENOUGH and not self._different:
            self._say("temperature", f"{self._compared} further samples of prompts are equal to the first; {DO_SAMPLE}")

    def _say(self, name: str, sign: str) -> None:
        if name not in self._said:
            self._said.add(name)
            logger.warning("The server seems to ignore %s=%s: %s", name, getattr(self.settings, name), sign)
