"""Empty figures of matplotlib, which is imported when a picture is asked for: `pip install 'curvax[fit]'`."""

from __future__ import annotations

from typing import Any


def new_axes(what: str, columns: int = 1, *, sharey: bool = False) -> Any:
    """The axis of a new figure, or an array of several.

    Args:
      what: who needs it, for the error.
      columns: axes side by side.
      sharey: whether they have one ordinate.

    Raises:
      ImportError: matplotlib is not installed; `what` needs it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'curvax[fit]'.") from error
    size = (6, 3.5) if columns == 1 else (4.5 * columns, 3.5)
    return plt.subplots(1, columns, figsize=size, sharey=sharey, layout="constrained")[1]
