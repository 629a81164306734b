"""Runs a command and reads what it prints; and how large its tiny models are."""

from __future__ import annotations

import re

from captum_attn.cli.app import run

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES["intermediate_size"] = 16


def printed(capsys, *arguments) -> str:
    assert run([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def rows(table: str) -> dict[str, list[float]]:
    """The printed words with their numbers."""
    found = re.findall(r"^  (\S+) +([-+]?[\d.e+-]+(?: +[-+]?[\d.e+-]+)*)$", table, re.M)
    return {word: [float(v) for v in values.split()] for word, values in found}
