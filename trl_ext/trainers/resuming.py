"""Resuming: from a checkpoint that is whole, by a run that is the same, to where the run stood."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from trl_ext.checkpoints import State, completeness, fsdp_files, manifest, plugin_state, run_record
from trl_ext.checkpoints.run_record import Changes
from trl_ext.errors import CheckpointError
from trl_ext.trainers.positions import PositionMixin

logger = logging.getLogger(__name__)
_RESET = "set reset_plugin_state=True to take its weights and start the plugins afresh"


class ResumingMixin(PositionMixin):
    """Wraps what TRL and transformers do to resume."""

    _ext_changes: Changes = Changes()
    """How this run differs from the one that wrote the checkpoint that it resumes from."""
    _ext_record: dict[str, Any] | None = None
    """What the manifest keeps of this run, once it has been asked for."""

    def ext_gather(self, value: Any) -> list[Any]:
        """Every rank's object, on every rank; a barrier too."""
        return self.ext_run.guard.gather(value)

    def ext_of_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on the first rank, or the error that it raises there, on every rank. Collective."""
        main = self.accelerator.process_index == 0
        return self.ext_gather(self.ext_on_each(work if main else lambda: None))[0]

    def ext_on_each(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on this rank, or the first error that it raises on any, on every rank. Collective."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # raised below, on all ranks
            failure = error
        for failed in self.ext_gather(failure):
            if failed is not None:
                raise failed
        return result

    # -- the checkpoint ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._ext_record = None
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint in ("True", "true"):  # a flag, also as the command line gives it
            checkpoint = str(self.ext_of_main(self._ext_newest_checkpoint))
        # A checkpoint with plugin state is checked without active plugins too: dropping it is a decision to be stated.
        elif checkpoint and self._ext_is_ours(checkpoint):
            self._ext_refuse_damage(Path(checkpoint))
        self._ext_changes, self._ext_resumed = Changes(), None
        if checkpoint and self._ext_is_ours(checkpoint):
            self.ext_of_main(partial(fsdp_files.refuse_other_files, Path(checkpoint), self._ext_fsdp_files()))
            self._ext_changes = self.ext_of_main(partial(self._ext_refuse_changes, Path(checkpoint)))
        return super().train(checkpoint, *args, **kwargs)

    def _ext_is_ours(self, checkpoint: str) -> bool:
        """Whether plugins are active, or were when the checkpoint was written."""
        folder = Path(checkpoint, manifest.FOLDER)
        return bool(self.ext_plugins) or bool(self.ext_of_main(folder.is_dir))

    def _ext_fsdp_files(self) -> str | None:
        """How accelerate's FSDP writes and reads weights in this run; None without it."""
        return self.accelerator.state.fsdp_plugin.state_dict_type.name if self.is_fsdp_enabled else None

    def _ext_newest_checkpoint(self) -> Path:
        """The newest complete checkpoint; incomplete ones are renamed, so that rotation does not count them."""
        output_dir = Path(self.args.output_dir)
        model_only, verify = self.args.save_only_model, self.args.verify_checkpoint
        newest, incomplete = completeness.newest_complete(output_dir, model_only, verify)
        for path, reason in incomplete:
            aside = completeness.set_aside(path)
            logger.warning("%s is incomplete (%s): set aside as %s", path, reason, aside.name)
        if newest is None:
            raise CheckpointError(f"no complete checkpoint in {output_dir}; start without resume_from_checkpoint")
        return newest

    def _ext_refuse_damage(self, checkpoint: Path) -> None:
        reason = self.ext_of_main(partial(completeness.incompleteness, checkpoint, self.args.save_only_model))
        if reason is None and self.args.verify_checkpoint:
            saved = self.ext_of_main(partial(manifest.read_manifest, checkpoint)) or {"files": {}}
            rank, reset = self.accelerator.process_index, self.args.reset_plugin_state
            reason = manifest.wrong_content(checkpoint, saved, rank, self.ext_gather, plugin_state=not reset)
        if reason is not None:
            raise CheckpointError(
                f"{checkpoint} is incomplete: {reason}; resume from another checkpoint, pass resume_from_checkpoint="
                f"True for the newest complete one or, if only a plugin's state is damaged, {_RESET}"
            )

    # -- the run -----------------------------------------------------------------------------------------------------

    def ext_run_record(self) -> dict[str, Any]:
        """What the manifest keeps of this run's config, data and streams; the data is read once a training."""
        if self._ext_record is None:
            self._ext_record = run_record.run_record(self.args, self.train_dataset, self.ext_streams)
        return self._ext_record

    def _ext_refuse_changes(self, checkpoint: Path) -> Changes:
        saved = manifest.read_manifest(checkpoint)
        changes = self._ext_compare(saved)
        reset, warn = self.args.reset_plugin_state, self.args.resume_changes == "warn"
        refused = [] if warn else changes.data + ([] if reset else changes.plugins)
        if refused:
            raise CheckpointError(
                f"{checkpoint} was written by another run: {run_record.in_words(refused)}. Set them as they were, set "
                f'resume_changes="warn" to go on with what is new, or {_RESET}'
            )
        if saved is not None and not reset:
            plugin_state.refuse_states(checkpoint, saved, self.ext_plugins, self.accelerator.num_processes)
        if found := changes.data + changes.plugins:
            logger.warning("%s was written by another run: %s", checkpoint, run_record.in_words(found))
        if settings := changes.settings:
            logger.warning("Settings that differ from those of %s: %s", checkpoint, run_record.in_words(settings))
        return changes

    def _ext_compare(self, saved: dict[str, Any] | None) -> Changes:
        plugins = [run_record.plugin_record(plugin) for plugin in self.ext_plugins]
        return run_record.compare(saved, plugins, self.ext_run_record())

    # -- where the run stood -----------------------------------------------------------------------------------------

    def ext_load_state(self, checkpoint: str) -> None:
        """Give plugins, streams and counters back what the checkpoint holds."""
        saved = self.ext_of_main(partial(manifest.read_manifest, Path(checkpoint)))
        if saved is None:
            logger.warning("%s was written without plugins: plugins and streams start from their beginning", checkpoint)
            return
        if not self.args.reset_plugin_state:
            self._ext_load_plugins(Path(checkpoint), saved, self._ext_changes.fresh_plugins)
        same_ranks = saved["world_size"] == self.accelerator.num_processes
        rank = self.accelerator.process_index if same_ranks else 0  # what all ranks have in common is on each
        state = self.ext_on_each(partial(plugin_state.load_rank_state, Path(checkpoint), rank))
        self.ext_load_rank_state(state)

    def _ext_load_plugins(self, checkpoint: Path, saved: dict[str, Any], fresh: Iterable[str]) -> None:
        """Give the plugins back what a checkpoint holds of them, but for those that start afresh. Collective."""
        per_rank = {record["name"]: record["per_rank"] for record in saved["plugins"]}
        rank = self.accelerator.process_index
        layout = next((p for p in self.ext_weights.parameters if isinstance(p, DTensor)), None)
        for plugin in self.ext_plugins:
            if hasattr(plugin.instance, "load_state_dict") and plugin.name not in fresh:
                load = partial(plugin_state.load_plugin, checkpoint, plugin, per_rank[plugin.name], rank, layout)
                self.ext_run.guard.run("load_state_dict", plugin.name, load, None)
        self.ext_run.guard.agree()

    def ext_load_rank_state(self, rank_state: State) -> None:
        """The reverse of `ext_rank_state`."""
        self._total_train_tokens = rank_state["total_train_tokens"]
        self.ext_load_position(rank_state["position"])
        for role, stream in self.ext_streams.items():
            if role not in self._ext_changes.fresh_streams and not self.args.reset_plugin_state:
                stream.load_state_dict(rank_state["streams"][role])

    def _load_best_model(self) -> None:
        """Plugins follow the weights: averages and the like belong to the best checkpoint from here on."""
        super()._load_best_model()
        if not self.ext_plugins:
            return
        best = Path(self.state.best_model_checkpoint)
        saved = self.ext_of_main(partial(manifest.read_manifest, best))
        if saved is not None:
            # A plugin that joined the run after this checkpoint keeps what it has.
            self._ext_load_plugins(best, saved, self._ext_compare(saved).fresh_plugins)
