"""Evaluation and the final save under the weights that `deployed_weights` puts in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from trl_ext.trainers.base import Opened

RAW_FOLDER = "raw"
"""Folder beside the final model, with the weights that training ended with, where others are deployed."""


class EvaluationMixin(Opened):
    """Wraps evaluation, prediction, `save_model` and `push_to_hub`; checkpoints keep the raw weights."""

    _ext_swapped = False

    def ext_deployed(self) -> dict[str, AbstractContextManager[None]]:
        """Contexts to evaluate under, by metric name; the first is the one to save under, its name is not shown."""
        if self.ext_prepared and not self._ext_swapped and self.ext_plugins.implements("deployed_weights"):
            contexts = self.ext_guard.exclusive("deployed_weights", nullcontext(), weights=self.ext_weights)
            self.ext_guard.agree()
            return dict(contexts) if isinstance(contexts, Mapping) else {"": contexts}
        return {"": nullcontext()}

    @contextmanager
    def ext_deploy(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Enter one of the contexts; inside, nothing is swapped again (`evaluate` calls itself for several sets)."""
        before, self._ext_swapped = self._ext_swapped, True
        swaps = not isinstance(context, nullcontext)
        try:
            with context:
                if swaps:
                    self._ext_forget_generator()
                yield
        finally:
            self._ext_swapped = before
            if swaps:
                self._ext_forget_generator()

    def _ext_forget_generator(self) -> None:
        """Make GRPO send the weights to vLLM again before it samples: they are other ones now."""
        if hasattr(self, "_last_loaded_step"):
            self._last_loaded_step = -1

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for i, (name, context) in enumerate(self.ext_deployed().items()):
            prefix = metric_key_prefix if i == 0 else f"{metric_key_prefix}_{name}"
            self.ext_metric_name = "" if i == 0 else name
            try:
                with self.ext_deploy(context):
                    metrics = {**super().evaluate(eval_dataset, ignore_keys, prefix), **metrics}
            finally:
                self.ext_metric_name = ""
        if self.ext_plugins:
            self.ext_guard.agree()
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self.ext_deploy(next(iter(self.ext_deployed().values()))):
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # a checkpoint
            super().save_model(output_dir, _internal_call=True)
            return
        context = next(iter(self.ext_deployed().values()))
        if not isinstance(context, nullcontext):
            raw = Path(output_dir or self.args.output_dir, RAW_FOLDER)
            super().save_model(str(raw), _internal_call=True)
        with self.ext_deploy(context):
            super().save_model(output_dir, _internal_call=False)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # It saves once more, as an internal call, over what `save_model` wrote.
        with self.ext_deploy(next(iter(self.ext_deployed().values()))):
            return super().push_to_hub(*args, **kwargs)
