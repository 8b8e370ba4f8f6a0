"""Every number that decides the outcome of the demo."""

from dataclasses import dataclass

RUNS: dict[str, list[str]] = {
    "nll": [],
    "nll + ema": ["ema:decay=0.98"],
    "power": ["power:alpha=1"],
    "power + ema": ["power:alpha=1", "ema:decay=0.98"],
}
"""The runs compared: name to what `SFTConfig(plugins=...)` is given."""


@dataclass(frozen=True)
class Settings:
    """The task is a chain of `chain_steps` additions and multiplications modulo 10, with every intermediate result."""

    seeds: int = 4
    chain_steps: int = 3
    hidden: int = 64
    base_rows: int = 16_384
    base_steps: int = 500
    base_batch_size: int = 128
    base_learning_rate: float = 3e-3
    demonstrations: int = 256
    noise: float = 0.5
    """Share of the demonstrations with a wrong step."""
    epochs: int = 24
    batch_size: int = 32
    learning_rate: float = 1e-3
    eval_steps: int = 16
    held_out: int = 500


QUICK = Settings(
    seeds=1, hidden=16, base_rows=256, base_steps=4, demonstrations=64, epochs=1, eval_steps=1, held_out=32
)
