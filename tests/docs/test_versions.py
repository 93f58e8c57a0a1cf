"""The tested range of JAX versions, and the warning outside it."""

from __future__ import annotations

import jax
import pytest

from curvax import versions

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("version", ["0.10.2", "0.11.2", "0.12.0.1", "0.12.9"])
def test_versions_inside_the_range_are_silent(version: str) -> None:
    assert versions.untested(version) is None


@pytest.mark.parametrize("version", ["0.9.0", "0.10.1", "0.13.0", "0.13.0.dev1", "1.0"])
def test_versions_outside_are_named(version: str) -> None:
    message = versions.untested(version)
    assert message is not None and version in message and "0.10.2" in message


def test_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match=r"0\.99\.0"):
        versions.warn_if_untested()
