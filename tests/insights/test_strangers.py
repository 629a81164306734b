"""What strangers can do: other names for the server, other pages, work without bounds, exits."""

from __future__ import annotations

import http.client
import sys

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from captum_attn.errors import OptionError
from captum_attn.insights import AttributionVisualizer, Batch
from captum_attn.insights.hosts import LOCAL, KnownHosts, checked_hosts, is_known
from captum_attn.insights.methods import MAX_STEPS, options_of
from tests.insights.asked import Visitor
from tests.insights.models import CLASSES, TinyViT, images, made, photo, softmax

pytest.importorskip("gradio")


class Leaves(TinyViT):
    """Ends the program where a pixel says so."""

    leaving: type[BaseException] = SystemExit

    def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
        if float(images.max()) > 5:
            if self.leaving is SystemExit:
                sys.exit("enough")
            raise self.leaving("enough")
        return super().forward(images, scale)


@pytest.fixture(scope="module")
def model():
    return made(Leaves)


@pytest.fixture(scope="module")
def dashboard(model):
    pixels = images(2)
    pixels[1, 0, 0, 0] = 70
    batch = Batch(pixels, torch.tensor([0, 1]))
    found = AttributionVisualizer(model, CLASSES, photo(), [batch], softmax)
    found.port = found.serve(hosts=["my.proxy.org"])
    yield found
    found.close()


def status(port: int, path: str = "/config", method: str = "GET", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    found = connection.getresponse().status
    connection.close()
    return found


def test_only_its_own_names_are_answered(dashboard):
    port = dashboard.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}", "[::1]",
                 "127.8.8.8", "my.proxy.org", "My.Proxy.org:443"):  # fmt: skip
        assert status(port, Host=host) == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example",
                 "localhost.evil", "192.168.0.7", "a@127.0.0.1", "127.0.0.1/x", "", "[::1",
                 "127.0.0.1:x"):  # fmt: skip
        assert status(port, Host=host) == 403, host
    assert status(port) == 400  # HTTP/1.1 has a Host


def test_no_other_page_may_ask(dashboard):
    port = dashboard.port
    good = {"Host": f"127.0.0.1:{port}"}
    for path in ("/", "/config", "/gradio_api/queue/join", "/gradio_api/upload"):
        method = "POST" if "api" in path else "GET"
        for page in ("http://evil.example", "null", "https://127.0.0.1.evil.example", "file://"):
            assert status(port, path, method, Origin=page, **good) == 403, (path, page)
    assert status(port, Origin=f"http://localhost:{port}", **good) == 200


@pytest.mark.parametrize(
    ("address", "known"),
    [("//10.0.0.1", True), ("//[fe80::1]:80", True), ("//evil.example", False),
     ("//2130706433", False), ("//0x7f.1", False)],
)  # fmt: skip
def test_everywhere_means_any_number_but_no_other_name(address, known):
    assert is_known(address, LOCAL, everywhere=True) is known


def test_a_websocket_of_another_host_is_closed():
    import asyncio

    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    async def never(*_):
        raise AssertionError

    scope = {"type": "websocket", "headers": [(b"host", b"evil.example")]}
    asyncio.run(KnownHosts(never)(scope, never, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("hosts", ["a.org", ["http://a.org"], ["a:80"], [""], [3], None, 3])
def test_hosts_that_are_none(hosts):
    with pytest.raises((OptionError, ValueError), match="hosts: expected"):
        checked_hosts(hosts)


@pytest.mark.parametrize("leaving", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_a_model_that_ends_the_program_does_not_hang_the_page(dashboard, model, leaving):
    model.leaving = leaving
    visitor = Visitor(dashboard.port, leaving.__name__)
    said, *rest = visitor.explained(Example=1)
    assert f"{leaving.__name__}: enough" in said and rest == ["", "", ""]
    said, *panels = visitor.explained()
    assert "Prediction" in said and all(panels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_steps": 10**9}, f"maximum value {MAX_STEPS}"),
        ({"n_steps": -3}, "minimum value 1"),
        ({"start_layer": -1}, "minimum value 0"),
        ({"or_a_text_of_yours": "a" * 5001}, "5001 letters"),
    ],
)
def test_bounds_hold_on_the_server(dashboard, changed, message):
    name = "Transition Attention (TAM)" if "n_steps" in changed else "Generic Attention (GAE)"
    pieces = Visitor(dashboard.port, "bounds").explained(Method=name, **changed)
    assert message in "".join(pieces).replace("&#x27;", "'")


@pytest.mark.parametrize("value", [10**9, 1, -3, "x", [], float("nan"), float("inf"), object()])
def test_bounds_hold_behind_the_page(value):
    (steps,) = options_of(IntegratedGradients)
    with pytest.raises(OptionError, match="n_steps: expected a number"):
        steps.read(value)
    assert steps.read("50") == 50 and steps.read("") == steps.default


def test_the_page_states_its_bounds(dashboard):
    visitor = Visitor(dashboard.port)
    page = visitor._get("/config").decode()
    assert f"n_steps up to {MAX_STEPS}" in page and "10 MiB and 40 megapixels" in page
    assert "20 waiting" in page and "5,000 letters" in page
    assert dashboard._page._queue.max_size == 20
