"""The declaration by which a plugin asks for a column of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

Per = Literal["sample", "message", "token"]
"""What a column has one value for: each row, each turn of the assistant, or each token."""
Kind = Literal["float", "int", "text"]

CARRIED = "trl_ext_columns"
"""The key under which prepared rows and batches hold the columns, one value for each token."""
ROW = "trl_ext_row"
"""The column among them that says which row of the data a token comes from; it is always there."""
START = "trl_ext_start"
"""The column among them that is 1 for the first token of a row of the data and 0 for the others; always there too."""


@dataclass(frozen=True)
class Column:
    """A column of the training data that a plugin names in its `columns`, and finds in `tokens.columns` (new in 1.4).

    Args:
        name: The column. One per message may also be a key of the messages.
        per: "sample" for one value a row, "message" for one each turn of the assistant, "token" for one each token.
        dtype: "float" is handed over as float32, "int" as int64, "text" as int64: the place of the text in `values`.
            A truth value counts as 0 or 1 and, as a text, as "true" or "false"; a whole number is a text too.
        default: What a row, turn or token without a value has; None if each must have one.
        values: The texts that may come, for "text".

    Raises:
        ValueError: The declaration is not of this form.
    """

    name: str
    per: Per = "sample"
    dtype: Kind = "float"
    default: Any = None
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name in ("input_ids", "labels"):
            raise ValueError(f"name={self.name!r} is no column beside the tokens")
        for option, value, allowed in (
            ("per", self.per, ("sample", "message", "token")),
            ("dtype", self.dtype, ("float", "int", "text")),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is not one of {', '.join(allowed)}")
        if (self.dtype == "text") != bool(self.values):
            raise ValueError(f"values={self.values!r}: a column of texts names them, and no other has any")
        if self.default is not None:
            self.encode(self.default)

    def encode(self, value: Any) -> float | int:
        """The number that stands for a value of the data, the default's for None.

        Raises:
            ValueError: The value is missing and there is no default, or it is not of the column's type.
        """
        value = self.default if value is None else value
        if value is None:
            raise ValueError("has no value, and the column has no default")
        if self.dtype == "text":
            return self._place(value)
        finite = isinstance(value, Real) and math.isfinite(value)
        if not finite:
            raise ValueError(f"has {value!r}, which is not a finite number")
        if self.dtype == "int" and value % 1:
            raise ValueError(f"has {value!r}, which is not a whole number")
        return float(value) if self.dtype == "float" else int(value)

    def _place(self, value: Any) -> int:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if text not in self.values:
            raise ValueError(f"has {value!r}, which is not one of {', '.join(self.values)}")
        return self.values.index(text)
