"""The benchmark scripts run, and what they compare is the same thing."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import captum_attn
from tests.benchmarks import benchmark, digit_share, matrix_form, measure, peers


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: case.method)
def test_the_matrix_form_computes_the_method(case):
    images = benchmark.images(3, tiny=True)
    method = getattr(captum_attn, case.method)(benchmark.build(tiny=True, fused=True))
    (tokens,) = method.attribute_tokens(images, target=benchmark.TARGET).values()
    plain = case.matrix(benchmark.build(tiny=True, fused=False), images, benchmark.TARGET)
    torch.testing.assert_close(tokens, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", benchmark.RELATED, ids=lambda case: case.method)
def test_passes_of_the_related_methods(case, monkeypatch):
    """As many runs of the model as their floors say: TAM and BI at K steps take K, no more."""
    (floor,) = case.floors
    model, images = benchmark.build(tiny=True, fused=True), benchmark.images(2, tiny=True)
    sizes = []
    model.register_forward_hook(lambda m, args, out: sizes.append(len(out) // len(images)))
    getattr(captum_attn, case.method)(model).attribute(
        images, target=benchmark.TARGET, **case.options
    )
    runs = sum(sizes)
    if case.method == "VitCX":  # 2 + 2 N, of the masks that it finds
        assert runs % 2 == 0 and runs > 2
    else:
        assert runs == int(floor[:-1] or 1)


def test_ratio_of_medians_and_its_interval():
    under = np.linspace(0.9, 1.1, 31)
    ratio = measure.ratio_of_medians(1.5 * under, under)
    assert tuple(ratio) == pytest.approx((1.5, 1.5, 1.5))
    noisy = measure.ratio_of_medians(np.roll(1.5 * under, 7), under)
    assert noisy.low < noisy.value < noisy.high


def test_interleaving_rotates_the_order():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = measure.interleave(calls, rounds=3)
    assert order == list("abcbcacab")
    assert all(len(values) == 3 for values in times.values())


def test_kept_maps_leave_no_hook():
    model = benchmark.build(tiny=True, fused=False)
    with matrix_form.kept_maps(model) as maps:
        model(benchmark.images(2, tiny=True))
    assert [tuple(A.shape) for A in maps] == [(2, 2, 17, 17)] * 2
    assert not any(block.attn.attn_drop._forward_hooks for block in model.blocks)


@pytest.mark.slow
def test_the_script_writes_its_table_and_numbers(tmp_path, capsys):
    path = tmp_path / "benchmark.json"
    threads = str(torch.get_num_threads())
    arguments = ["--tiny", "--pairs", "3", "--batches", "2", "--threads", threads, "--methods"]
    arguments += ["AttentionRollout", "VTranM", "captum Saliency", "--peers", "--related"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [r["method"] for r in results] == arguments[8:-2]
    for r in results:
        assert len(r["times_s"]["method"]) == 3
        for floor, bar in r["bars"].items():
            assert r["holds"][floor] in (None, r["ratios"][floor]["low"] <= (bar or 0))
        assert all(50 < peak < 5000 for peak in r["peak_mib"].values())
    assert "| 2 | VTranM |" in capsys.readouterr().out


def test_a_peer_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    arguments = ["--tiny", "--pairs", "1", "--batches", "1", "--no-memory", "--peers"]
    arguments += ["--methods", "grad-cam", "--json", str(tmp_path / "benchmark.json")]
    assert benchmark.main(arguments) == 0
    assert "grad-cam is left out" in capsys.readouterr().err


def test_classes_that_lxt_changes_are_put_back():
    before = dict(vars(nn.GELU))

    def patch(changed):
        changed.forward, changed.more = (lambda self, x: x), True

    x = torch.randn(3)
    with pytest.raises(KeyError), peers.patched({nn.GELU: patch}):
        assert torch.equal(nn.GELU()(x), x) and nn.GELU.more
        raise KeyError
    assert dict(vars(nn.GELU)) == before


def test_shares_count_positive_relevance_on_either_mask():
    relevance = torch.tensor([[[3.0, -9.0], [1.0, 4.0]]])
    masks = torch.tensor([[[[True, True], [False, False]], [[False, False], [True, False]]]])
    assert digit_share.shares(relevance, masks).tolist() == [[3 / 8, 1 / 8]]


class Oracle:
    """Knows where the asked digit is, or always points at the first one."""

    def __init__(self, batch, follows):
        self.batch, self.follows = batch, follows

    def attribute(self, images, target):
        k = (self.batch.labels == target[:, None]).int().argmax(1) if self.follows else 0
        return self.batch.masks[torch.arange(len(images)), k][:, None].float()


@pytest.mark.parametrize(("follows", "right"), [(True, 1.0), (False, 0.5)])
def test_digit_share_of_a_map_that_follows_the_question_and_of_one_that_does_not(follows, right):
    batch = digit_share.scenes(6, split="test", seed=1)
    share = digit_share.evaluate(lambda model: Oracle(batch, follows), None, batch)
    assert share.right == (right, 0.0)
    assert share.asked[0] + share.other[0] == pytest.approx(1.0)
