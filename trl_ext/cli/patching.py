"""Our trainers and configs under TRL's names, for scripts that import them from TRL."""

from importlib import import_module

NAMES = ("SFT", "GRPO", "DPO", "KTO", "RLOO", "Reward", "Distillation")
"""Of the trainers: their classes end in `Trainer` and `Config`; in lower case they name TRL's modules and scripts."""
PLACES: dict[str, tuple[str, ...]] = {}
"""Each of our classes, and the modules of TRL that export one of its name."""
for _name in NAMES:
    _exports = ("trl", "trl.trainer", f"trl.trainer.{_name.lower()}_trainer")
    PLACES[f"{_name}Config"] = (*_exports, f"trl.trainer.{_name.lower()}_config")
    PLACES[f"{_name}Trainer"] = _exports


def patch_trl() -> None:
    """Replace TRL's trainers and configs, in this process, wherever TRL exports them.

    Call it before the script's own imports of TRL: a name bound earlier keeps TRL's class.
    """
    import trl_ext

    # All of ours first: they subclass what is replaced below.
    replacements = {name: getattr(trl_ext, name) for name in PLACES}
    for name, places in PLACES.items():
        for place in places:
            setattr(import_module(place), name, replacements[name])
