"""The script of growing sequences runs, and compares what it says."""

import json

import numpy as np
import pytest
import torch

from captum_attn import GenericAttention
from tests.benchmarks import models, scaling


def test_exponents():
    tokens = [1000, 2000, 4000]
    assert scaling.exponent(tokens, [3 * n**2 for n in tokens]) == pytest.approx(2)
    assert scaling.exponent(tokens, [7 * n for n in tokens]) == pytest.approx(1)


@pytest.mark.parametrize("name", models.MODELS)
def test_ours_explains_what_is_differentiated(name, monkeypatch):
    """Both calls run the same weights on the same input: the output they select is the same."""
    selected = []
    real = torch.autograd.grad

    def grad(outputs, *arguments, **options):
        value = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            selected.append(float(value))
        return real(outputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    for kind in ("F", "ours"):
        torch.manual_seed(0)
        models.MODELS[name].calls(models.TINY[name][0], True, kind)()
    assert np.isfinite(selected).all() and selected[0] == pytest.approx(selected[-1], rel=1e-4)


def test_the_plain_forms_are_the_method():
    torch.manual_seed(0)
    model, x = models.vit_and_image(17, tiny=True)
    found = {}
    for kind in models.PLAIN:
        torch.manual_seed(0)
        found[kind] = models.vit(17, True, kind)()
    tokens = GenericAttention(model).attribute_tokens(x, target=models.TARGET)["x"]
    torch.testing.assert_close(found["M"], tokens)
    torch.testing.assert_close(found["P"], tokens[0])


@pytest.mark.slow
def test_the_script_resumes_and_draws(tmp_path, capsys):
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    arguments = ["--tiny", "--pairs", "2", "--json", str(path), "--models", "vit", "--threads", "1"]
    assert scaling.main([*arguments, "--tokens", "17"]) == 0
    before = json.loads(path.read_text())["results"]
    assert scaling.main([*arguments, "--resume", "--plot", str(picture)]) == 0
    results = json.loads(path.read_text())["results"]
    assert results[: len(before)] == before and [r["tokens"] for r in results] == [17, 50]
    assert all(set(r["peak_mib"]) == {"ours", "F", "P", "M"} for r in results)
    assert picture.stat().st_size > 10_000
    assert "| vit | 50 |" in capsys.readouterr().out
