"""Notebooks are slow tests, which `-m slow` runs."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what nbmake collects."""
    if item.path.suffix == ".ipynb":
        item.add_marker(pytest.mark.slow)
