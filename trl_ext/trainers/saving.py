"""Saving: plugin state in the checkpoint, a manifest of all its files, and a model card that names the plugins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_ext.checkpoints import State, manifest, plugin_state, run_record
from trl_ext.startup.report import add_to_model_card
from trl_ext.trainers.resuming import ResumingMixin


class CheckpointMixin(ResumingMixin):
    """Wraps what TRL and transformers do to save; see `trl_ext.checkpoints` for the files."""

    _ext_manifest: tuple[Path, dict[str, Any]] | None = None
    """The folder of the checkpoint that is being written and what its manifest will hold; None at other times."""

    def _save_rng_state(self, output_dir: str) -> None:
        """The last step before `trainer_state.json`: everything else of the checkpoint is written by now."""
        super()._save_rng_state(output_dir)
        if self.ext_plugins:
            folder, rank = Path(output_dir), self.accelerator.process_index
            plugin_state.save_state(folder, self.ext_plugins, self.ext_rank_state, rank=rank, gather=self.ext_gather)
            self._ext_manifest = (
                folder,
                {
                    "world_size": self.accelerator.num_processes,
                    "plugins": [run_record.plugin_record(plugin) for plugin in self.ext_plugins],
                    "run": self.ext_run_record(),
                    "files": manifest.list_files(folder, self.ext_gather, rank),
                },
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._ext_state_then_manifest():
            super()._save_checkpoint(model, trial)
        self._ext_write_manifest()  # TRL has files of its own that follow, such as that of the entropy bonus
        self._ext_manifest = None

    @contextmanager
    def _ext_state_then_manifest(self) -> Iterator[None]:
        """Write the manifest right after `trainer_state.json`: transformers deletes older checkpoints next."""
        state, save = self.state, self.state.save_to_json

        def save_then_write_manifest(json_path: str) -> None:
            save(json_path)
            self._ext_write_manifest()

        state.save_to_json = save_then_write_manifest
        try:
            yield
        finally:
            del state.save_to_json  # the class's own shows again

    def _ext_write_manifest(self) -> None:
        if self._ext_manifest is not None and self.args.should_save:
            manifest.write_manifest(*self._ext_manifest)

    def ext_rank_state(self) -> State:
        """What the trainer keeps on this rank, beside what TRL saves."""
        return {
            "streams": {role: stream.state_dict() for role, stream in self.ext_streams.items()},
            "total_train_tokens": self._total_train_tokens,
            "position": self.ext_position(),
        }

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.ext_plugins and self.is_world_process_zero():
            add_to_model_card(Path(self.args.output_dir) / "README.md", self.ext_plugins)
