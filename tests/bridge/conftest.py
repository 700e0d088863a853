"""The command's output and settings, kept out of other tests."""

import math

import pytest

from bridge import progress


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """Progress says nothing, as its lines come with the time; and what the command sets for its children is undone."""
    monkeypatch.setattr(progress, "FIRST", math.inf)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.delenv("PYTHONSAFEPATH")
