"""Weight averaging: plugins for training, one file each over one mechanism (`online`), and averages of checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext_averaging.bema import Bema
    from trl_ext_averaging.ema import Ema
    from trl_ext_averaging.lawa import Lawa
    from trl_ext_averaging.swa import Swa
    from trl_ext_averaging.wise_ft import WiseFt

__all__ = ["Bema", "Ema", "Lawa", "Swa", "WiseFt"]

_HOMES = {
    "Bema": "trl_ext_averaging.bema",
    "Ema": "trl_ext_averaging.ema",
    "Lawa": "trl_ext_averaging.lawa",
    "Swa": "trl_ext_averaging.swa",
    "WiseFt": "trl_ext_averaging.wise_ft",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: commands of this distribution answer `--help` without torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
