"""Evaluation and the final save, under the weights that `deployed_weights` puts in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import StateDictType

from trl_ext.startup.report import RAW_FOLDER, where_weights_are
from trl_ext.trainers.base import Opened


class DeploymentMixin(Opened):
    """Wraps evaluation, prediction, `save_model` and `push_to_hub`; checkpoints keep the raw weights."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        owner = self.ext_plugins.owner("deployed_weights")
        if owner is not None and self.is_world_process_zero():
            print(
                f"The model in memory has the weights that training ended with. {where_weights_are(owner)}", flush=True
            )
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        outer = self.ext_metric_name  # several data sets come here again, under the weights that are in place already
        for i, (name, context) in enumerate(self.ext_swaps.deployed().items()):
            prefix = metric_key_prefix if i == 0 else f"{metric_key_prefix}_{name}"
            self.ext_metric_name = outer if i == 0 else name
            try:
                with self.ext_swaps.enter(context):
                    metrics = {**super().evaluate(eval_dataset, ignore_keys, prefix), **metrics}
            finally:
                self.ext_metric_name = outer
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
        with self._ext_gathering():
            if not isinstance(context, nullcontext):
                raw = Path(output_dir or self.args.output_dir, RAW_FOLDER)
                super().save_model(str(raw), _internal_call=True)
            with self.ext_swaps.enter(context):
                super().save_model(output_dir, _internal_call=False)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        # It saves once more, as an internal call, over what `save_model` wrote.
        with self._ext_gathering(), self.ext_swaps.enter(self.ext_swaps.to_save()):
            return super().push_to_hub(*args, **kwargs)

    @contextmanager
    def _ext_gathering(self) -> Iterator[None]:
        """Let a save gather the shards of FSDP2: with SHARDED_STATE_DICT, accelerate's default, it writes no model."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if fsdp is None or not self.ext_plugins.implements("deployed_weights"):
            yield
            return
        before, fsdp.state_dict_type = fsdp.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            fsdp.state_dict_type = before
