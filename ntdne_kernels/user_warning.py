"""Warnings that point at the user's line."""

import os
import sys
import warnings

import torch

# torch's frames lie between the user's line and ours: Module.__call__, the wrapper of no_grad, the call of an operator.
NOT_THE_USERS = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, str(torch.__file__)))


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the nearest line on the stack that is neither this package's nor torch's.

    Python 3.12 has `warnings.warn(..., skip_file_prefixes=...)` for this, 3.11 has not.
    """
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(message, category, stacklevel=stacklevel)
