"""What every test has: a place of its own for what is measured."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def measurements_are_kept_nowhere_else(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LCC_CACHE", str(tmp_path_factory.mktemp("measurements")))
