"""No lines of progress in what a test reads: they come with the time."""

import math

import pytest

from bridge import progress


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """Progress that never finds the time to say anything, but for a test that sets it."""
    monkeypatch.setattr(progress, "FIRST", math.inf)
