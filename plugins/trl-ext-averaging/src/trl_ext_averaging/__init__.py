"""Weight averaging: plugins for training (`ema`), each in its own file over one mechanism (`online`)."""

from trl_ext_averaging.ema import Ema

__all__ = ["Ema"]
