"""The tests and what they share, one package: `tests.oracle` is the truth, `tests.structure.zoo` the models."""
