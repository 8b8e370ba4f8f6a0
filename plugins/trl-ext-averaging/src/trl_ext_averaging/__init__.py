"""Weight averaging: plugins for training, one file each over one mechanism (`online`), and averages of checkpoints."""

from trl_ext_averaging.bema import Bema
from trl_ext_averaging.ema import Ema
from trl_ext_averaging.lawa import Lawa
from trl_ext_averaging.swa import Swa
from trl_ext_averaging.wise_ft import WiseFt

__all__ = ["Bema", "Ema", "Lawa", "Swa", "WiseFt"]
