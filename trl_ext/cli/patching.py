"""Our trainers and configs under TRL's names, for scripts that import them from TRL."""

from importlib import import_module

PLACES: dict[str, tuple[str, ...]] = {
    "SFTConfig": ("trl", "trl.trainer", "trl.trainer.sft_config", "trl.trainer.sft_trainer"),
    "SFTTrainer": ("trl", "trl.trainer", "trl.trainer.sft_trainer"),
    "GRPOConfig": ("trl", "trl.trainer", "trl.trainer.grpo_config", "trl.trainer.grpo_trainer"),
    "GRPOTrainer": ("trl", "trl.trainer", "trl.trainer.grpo_trainer"),
}


def patch_trl() -> None:
    """Replace TRL's SFT and GRPO trainers and configs, in this process, wherever TRL exports them.

    Call it before the script's own imports of TRL: a name bound earlier keeps TRL's class.
    """
    import trl_ext

    # All of ours first: they subclass what is replaced below.
    replacements = {name: getattr(trl_ext, name) for name in PLACES}
    for name, places in PLACES.items():
        for place in places:
            setattr(import_module(place), name, replacements[name])
