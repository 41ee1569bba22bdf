"""Warnings that point at the line of the caller, however deep they arise."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

#: Files whose frames are skipped: ours, and those by which torch calls a module.
_INSIDE = tuple(
    str(Path(module).parent) + os.sep for module in (__file__, torch.__file__)
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """
    Issues a warning at the innermost line outside of this package and torch.

    :param str message: the text.
    :param type category: class of the warning.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
