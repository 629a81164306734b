"""What a mistake on the command line looks like, and the help."""

from __future__ import annotations

import re

import pytest

from captum_attn.cli.app import run
from tests.explain.command import printed

T, I = ["explain-text", "goal"], ["explain-image", "scene.png"]  # noqa: E741
TOPICS, DIGITS = [*T, "--model", "topics"], [*I, "--model", "digit-vit"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (T, "Missing option '--model'"),
        (["explain-image", "--model", "digit-vit"], "Missing argument 'FILE'"),
        (
            [*T, "--model", "no/such/folder"],
            "--model: there is no model 'no/such/folder': no folder at",
        ),
        ([*T, "--model", "digit-vit"], "'digit-vit' is for images: see captum-attn explain-image"),
        ([*I, "--model", "topics"], "'topics' is for text: see captum-attn explain-text"),
        ([*T, "--model", "digit-vit", "--labels", "a, b"], "--labels are for the model topics"),
        ([*TOPICS, "--target", "sprot"], "no class 'sprot': expected predicted, one of sport,"),
        ([*TOPICS, "--target", "8"], "has 8 outputs, 0 to 7; got 8"),
        ([*TOPICS, "--method", "Magic"], "--method: neither captum_attn nor captum.attr has"),
        ([*TOPICS, "--method", "GenericAttention("], "--method: cannot read"),
        ([*TOPICS, "--method", ""], "--method: expected at least one"),
        ([*TOPICS, "--method", "GenericAttention(powr=2)"], "powr"),
        (
            [*TOPICS, "--out", "why.txt"],
            "--out: expected a file ending in .png, .html, .json or .csv, got",
        ),
        ([*TOPICS, "--out", "no/such/why.png"], "no folder at 'no/such'; give --out a file in"),
        ([*TOPICS, "--top", "0"], "Invalid value for '--top'"),
        ([*TOPICS, "--device", "moon"], "--device: 'moon' cannot be used"),
        (["explain-text", " ", "--model", "topics"], "has no words"),
        (["explain-text", "goal " * 300, "--model", "topics"], "the model reads 256"),
        (["explain-image", "no.png", "--model", "digit-vit"], "no picture at 'no.png'"),
        ([*DIGITS, "--target", "3.5"], "expected predicted, one of 0, 1, 2"),
        ([*DIGITS, "--labels", "a, b"], "No such option: --labels"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, scene, capsys):
    assert run([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.startswith("captum-attn: ")
    assert captured.err.count("\n") == 1 and not captured.out
    assert [path.name for path in scene.parent.iterdir()] == ["scene.png"]


@pytest.mark.parametrize("command", ["explain-text", "explain-image"])
def test_help_reads_well(command, capsys):
    shown = printed(capsys, command, "--help")
    assert shown.startswith(f"Usage: captum-attn {command}")
    assert all(o in shown for o in ("--model", "--method", "--target", "--out", "[required]"))
    assert not re.search(r"[│╭\x1b]", shown)
