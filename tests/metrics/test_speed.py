"""The benchmark compares equal numbers."""

import pytest
import torch


def test_the_loop_and_the_engine_agree_on_the_digit_vit(capsys):
    pytest.importorskip("timm")
    from tests.benchmarks import perturbation_speed

    assert perturbation_speed.main(["--scenes", "2", "--rounds", "2"]) == 0
    assert "times faster" in capsys.readouterr().out


def test_a_difference_is_not_timed(monkeypatch):
    pytest.importorskip("timm")
    from tests.benchmarks import perturbation_speed

    right = perturbation_speed.batched
    monkeypatch.setattr(perturbation_speed, "batched", lambda *given: right(*given) + 0.01)
    with pytest.raises(AssertionError):
        perturbation_speed.main(["--scenes", "1", "--rounds", "1"])
    assert torch.is_grad_enabled()
