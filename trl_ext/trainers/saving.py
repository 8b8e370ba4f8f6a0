"""Saving and resuming: plugin state in the checkpoint, complete or ignored, and a model card that names the plugins."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trl_ext.checkpoints import State, completeness, plugin_state
from trl_ext.errors import CheckpointError
from trl_ext.startup.report import add_to_model_card
from trl_ext.trainers.base import Opened

logger = logging.getLogger(__name__)


class CheckpointMixin(Opened):
    """Wraps what TRL and transformers do around checkpoints; see `trl_ext.checkpoints` for the files."""

    def ext_gather(self, value: Any) -> list[Any]:
        """Every rank's object, on every rank; a barrier too."""
        world = self.accelerator.num_processes
        if world == 1:
            return [value]
        values: list[Any] = [None] * world
        dist.all_gather_object(values, value)
        return values

    # -- saving ------------------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """The last step before `trainer_state.json`: everything else of the checkpoint is written by now."""
        super()._save_rng_state(output_dir)
        if self.ext_plugins:
            plugin_state.save_state(
                Path(output_dir),
                self.ext_plugins,
                self.ext_rank_state(),
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                gather=self.ext_gather,
            )

    def ext_rank_state(self) -> State:
        """What the trainer keeps on this rank, beside what TRL saves."""
        return {
            "streams": {role: stream.state_dict() for role, stream in self.ext_streams.items()},
            "total_train_tokens": self._total_train_tokens,
        }

    # -- resuming ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint in ("True", "true"):  # a flag, also as the command line gives it
            checkpoint = str(self._ext_newest_checkpoint())
        # A checkpoint with plugin state is checked without active plugins too: dropping it is a decision to be stated.
        if checkpoint and (self.ext_plugins or Path(checkpoint, plugin_state.FOLDER).is_dir()):
            reason = completeness.incompleteness(Path(checkpoint), self.args.save_only_model)
            if reason is not None:
                raise CheckpointError(
                    f"{checkpoint} is incomplete: {reason}; resume from another checkpoint, or pass "
                    "resume_from_checkpoint=True for the newest complete one"
                )
            if not self.args.reset_plugin_state:
                world = self.accelerator.num_processes
                plugin_state.verify_plugins(Path(checkpoint), self.ext_plugins, world)
        return super().train(checkpoint, *args, **kwargs)

    def _ext_newest_checkpoint(self) -> Path:
        """The newest complete checkpoint; incomplete ones are renamed, so that rotation does not count them."""
        output_dir = Path(self.args.output_dir)
        self.ext_gather(None)
        if self.accelerator.is_main_process:
            for path, reason in completeness.newest_complete(output_dir, self.args.save_only_model)[1]:
                aside = completeness.set_aside(path)
                logger.warning("%s is incomplete (%s): set aside as %s", path, reason, aside.name)
        self.ext_gather(None)
        newest, _ = completeness.newest_complete(output_dir, self.args.save_only_model)
        if newest is None:
            raise CheckpointError(f"no complete checkpoint in {output_dir}; start without resume_from_checkpoint")
        return newest

    def ext_load_state(self, checkpoint: str) -> None:
        """Give plugins, streams and counters back what the checkpoint holds."""
        path = Path(checkpoint)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if not self.args.reset_plugin_state:
            for plugin in self.ext_plugins:
                load = partial(plugin_state.load_plugin, path, plugin, rank)
                self.ext_run.guard.run("load_state_dict", plugin.name, load, None)
            self.ext_run.guard.agree()
        rank_state = plugin_state.load_rank_state(path, rank, world)
        if rank_state is None:
            logger.warning(
                "%s holds no trainer state of trl_ext for %d ranks: streams start from their beginning", path, world
            )
            return
        self.ext_load_rank_state(rank_state)

    def ext_load_rank_state(self, rank_state: State) -> None:
        """The reverse of `ext_rank_state`."""
        self._total_train_tokens = rank_state["total_train_tokens"]
        for role, stream in self.ext_streams.items():
            if role in rank_state["streams"] and not self.args.reset_plugin_state:
                stream.load_state_dict(rank_state["streams"][role])

    def _load_best_model(self) -> None:
        """Plugins follow the weights: averages and the like belong to the best checkpoint from here on."""
        super()._load_best_model()
        best = Path(self.state.best_model_checkpoint)
        if self.ext_plugins and plugin_state.read_manifest(best) is not None:
            for plugin in self.ext_plugins:
                plugin_state.load_plugin(best, plugin, self.accelerator.process_index)

    # -- model card --------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.ext_plugins and self.is_world_process_zero():
            add_to_model_card(Path(self.args.output_dir) / "README.md", self.ext_plugins)
