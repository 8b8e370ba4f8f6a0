"""Evaluation and the final save, under the weights that `deployed_weights` puts in place."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from trl_ext.trainers.base import Opened

RAW_FOLDER = "raw"
"""Folder beside the final model, with the weights that training ended with, where others are deployed."""


class DeploymentMixin(Opened):
    """Wraps evaluation, prediction, `save_model` and `push_to_hub`; checkpoints keep the raw weights."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for i, (name, context) in enumerate(self.ext_swaps.deployed().items()):
            prefix = metric_key_prefix if i == 0 else f"{metric_key_prefix}_{name}"
            self.ext_metric_name = "" if i == 0 else name
            try:
                with self.ext_swaps.enter(context):
                    metrics = {**super().evaluate(eval_dataset, ignore_keys, prefix), **metrics}
            finally:
                self.ext_metric_name = ""
        if self.ext_plugins:
            self.ext_run.guard.agree()
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self.ext_swaps.enter(self.ext_swaps.to_save()):
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # a checkpoint
            super().save_model(output_dir, _internal_call=True)
            return
        context = self.ext_swaps.to_save()
        if not isinstance(context, nullcontext):
            raw = Path(output_dir or self.args.output_dir, RAW_FOLDER)
            super().save_model(str(raw), _internal_call=True)
        with self.ext_swaps.enter(context):
            super().save_model(output_dir, _internal_call=False)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # It saves once more, as an internal call, over what `save_model` wrote.
        with self.ext_swaps.enter(self.ext_swaps.to_save()):
            return super().push_to_hub(*args, **kwargs)
