"""Whole steps against the oracle: operators, lanes, presets, and everything around them."""
