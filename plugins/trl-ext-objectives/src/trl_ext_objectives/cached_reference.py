"""A reference whose log-probabilities were computed once and written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trl_ext_probing.capability.log_prob_cache import LogProbCache

from trl_ext_objectives.reference import Reference

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord


class CachedReference(Reference):
    """Log-probabilities of a file, found by the content of each sample."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._cache: LogProbCache | None = None

    def check(self, run: RunDescription) -> None:
        self._cache = LogProbCache(self._path)

    def setup(self, context: SetupContext) -> None:
        self._cache = self._cache or LogProbCache(self._path)
        self._cache.check_vocabulary(context.tokenizer)

    def log_probs(self, tokens: TokenRecord) -> Tensor:
        self._cache = self._cache or LogProbCache(self._path)
        return self._cache.log_probs(tokens)
