"""Output that somebody may stop reading."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


def until_closed(work: Callable[[], int | None]) -> int:
    """`work()`, which prints, and its exit code (0 for `None`); once nobody reads on (`| head`), that of SIGPIPE."""
    try:
        code = work() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python still holds back for the closed pipe would fail once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    return code
