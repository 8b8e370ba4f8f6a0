"""The files that trl_ext adds to a checkpoint, and how a complete checkpoint is told from an incomplete one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.checkpoints.files import newest_complete

__all__ = ["newest_complete"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # at first use: the files need torch
        from importlib import import_module

        return getattr(import_module("trl_ext.checkpoints.files"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
