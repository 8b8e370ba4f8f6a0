"""`trl-ext probe passk`: its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from trl_ext.errors import ConfigurationError
from trl_ext_probing.settings import DataSettings, Option, RewardSettings, SampledModelSettings


@dataclass(frozen=True, kw_only=True)
class PasskSettings(SampledModelSettings, DataSettings, RewardSettings):
    """What `passk` measures; `k` and `solved_at` judge the samples and decide none of them."""

    output: Annotated[Path, Option(help="Folder for samples and results; the same command goes on in it.")] = Path(
        "passk"
    )
    n: Annotated[int, Option(help="Samples of each problem.", min=1)] = 32
    k: Annotated[str, Option(help="Values of k, with commas; none above n.")] = "1,8,32"
    solved_at: Annotated[float, Option(help="Reward from which a sample counts as correct.")] = 1.0
    temperature: Annotated[float, Option(help="Sampling temperature; 0 decodes greedily.", min=0.0)] = 0.6
    max_completion_length: Annotated[int, Option(help="Longest completion in tokens.", min=1)] = 512

    probe: ClassVar[str] = "passk"
    free: ClassVar[frozenset[str]] = SampledModelSettings.free | {"n", "k", "solved_at"}

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.ks

    @property
    def ks(self) -> list[int]:
        """The values of k, ascending.

        Raises:
            ConfigurationError: They are not whole numbers from 1 to n.
        """
        try:
            ks = sorted({int(part) for part in self.k.split(",")})
        except ValueError:
            raise ConfigurationError(f"--k {self.k!r} is not a list of whole numbers such as 1,8,32") from None
        if ks[0] < 1 or ks[-1] > self.n:
            raise ConfigurationError(f"--k {self.k!r} with --n {self.n}: every k is in [1, n]; raise --n or lower --k")
        return ks
