"""Serving the dashboard: where it listens, what it refuses, and the command."""

from __future__ import annotations

import json
import socket
import sys
from urllib.request import urlopen

import pytest
import torch

from captum_attn.errors import AttnError, MissingExtraError
from captum_attn.insights import AttributionVisualizer, Batch, visualizer
from tests.insights.models import CLASSES, TinyViT, images, made, photo, softmax


@pytest.fixture
def dashboard():
    batch = Batch(images(2), torch.tensor([0, 1]))
    found = AttributionVisualizer(made(TinyViT), CLASSES, photo(), [batch], softmax)
    yield found
    found.close()


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio")


def config(port: int) -> dict:
    with urlopen(f"http://127.0.0.1:{port}/config", timeout=60) as answer:
        return json.load(answer)


def test_it_listens_to_this_computer_only_until_it_is_closed(gradio, dashboard, capsys):
    port = dashboard.serve()
    assert f"Open http://127.0.0.1:{port}/" in capsys.readouterr().out
    page = config(port)
    assert page["title"] == "captum_attn"
    assert page["analytics_enabled"] is False
    server = dashboard._page.server
    (listening,) = server.servers[0].sockets
    assert listening.getsockname()[0] == "127.0.0.1"
    assert dashboard._page.share is False
    dashboard.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 60):
        pass


def test_no_call_of_the_page_is_offered_to_other_programs(gradio, dashboard):
    port = dashboard.serve()
    assert all(call["api_visibility"] == "private" for call in config(port)["dependencies"])


def test_a_port_in_use_is_refused(gradio, dashboard):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(AttnError, match=rf"port {port} on 127.0.0.1 cannot be used \(Address"):
            dashboard.serve(port=port)
    with pytest.raises(AttnError, match="port: .* 65535, got 70000"):
        dashboard.serve(port=70_000)


def test_without_gradio_the_extra_is_named(monkeypatch, dashboard):
    monkeypatch.delitem(sys.modules, "captum_attn.insights.page", raising=False)
    monkeypatch.delattr("captum_attn.insights.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r'pip install "captum_attn\[insights\]"'):
        dashboard.serve()


def test_an_upload_above_the_limit_is_not_taken(gradio, dashboard, monkeypatch):
    httpx = pytest.importorskip("httpx")
    monkeypatch.setattr(visualizer, "MAX_BYTES", 1000)
    port = dashboard.serve()
    url = f"http://127.0.0.1:{port}/gradio_api/upload"
    small = httpx.post(url, files={"files": ("a.png", bytes(500))}, trust_env=False)
    large = httpx.post(url, files={"files": ("a.png", bytes(5000))}, trust_env=False)
    assert (small.status_code, large.status_code) == (200, 413)


def test_the_command_serves_the_packages_models(gradio, monkeypatch, capsys):
    from captum_attn.cli.app import run

    served = {}

    def serve(sessions, blocking, debug, port, bind_all):
        served.update(sessions=sessions, blocking=blocking, bind_all=bind_all, port=port)

    monkeypatch.setattr(visualizer, "serve", serve)
    assert run(["dashboard", "--models", "digits, questions"]) == 0
    assert list(served["sessions"]) == ["digits", "questions"]
    assert (served["blocking"], served["bind_all"]) == (True, False)
    questions = served["sessions"]["questions"]
    example = questions.examples[0]
    predicted = questions.predict("digit LXMERT", example)[0]
    assert predicted.target == example.label
    why = questions.explain("digit LXMERT", example, "Generic Attention (GAE)")
    assert [output.type for output in why.outputs] == ["text", "image", "empty"]
    assert questions.own(example, text="Is there an 8?").inputs[0].shape == (1, 7)
    assert served["sessions"]["digits"].takes_picture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "digits,cats"], "--models: expected some of digits, topics, questions"),
        (["--port", "0"], "Invalid value for '--port'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    from captum_attn.cli.app import run

    assert run(["dashboard", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_port_in_use_is_refused_before_the_models_are_loaded(gradio, capsys):
    from captum_attn.cli.app import run

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert run(["dashboard", "--port", str(other.getsockname()[1])]) == 2
    out, err = capsys.readouterr()
    assert "cannot be used" in err and "Loading" not in out
