"""Extras are imported where they are used, so that the rest works without them."""

import ast
from pathlib import Path

import pytest

import captum_attn.metrics

FOLDER = Path(captum_attn.metrics.__file__).parent
ALWAYS_THERE = {"torch", "captum", "numpy", "captum_attn"}
STANDARD = {
    "__future__", "collections", "contextlib", "dataclasses", "hashlib", "inspect", "io", "json",
    "math", "pathlib",
    "typing",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_no_extra_at_the_top_of_a_file(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= ALWAYS_THERE | STANDARD


def test_every_public_name_is_there():
    for name in captum_attn.metrics.__all__:
        assert hasattr(captum_attn.metrics, name), name
