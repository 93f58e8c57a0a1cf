"""How much memory rows and their factors may take."""

DEFAULT_MAX_BYTES = 2 << 30
"""2 GiB: 1,280 rows of 400,000 float32 parameters at once."""
