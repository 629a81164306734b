"""Names of methods and models: as papers call them, and answered before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
import time

import captum.attr
import pytest

import captum_attn
from captum_attn._method_names import ALIASES, _of_captum, method_class, method_name
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation.command import methods_of
from captum_attn.evaluation.embedded import LOADERS
from captum_attn.evaluation.models import load
from captum_attn.evaluation.names import EMBEDDED


def test_methods_by_their_papers_names():
    found = methods_of("methods", "GAE, T-Attr(start_layer=-1), roll_out, VTRANM, Grad-CAM, IG")
    assert found == {
        "GAE": ("GenericAttention", {}),
        "T-Attr(start_layer=-1)": ("TransformerAttribution", {"start_layer": -1}),
        "roll_out": ("AttentionRollout", {}),
        "VTRANM": ("VTranM", {}),
        "Grad-CAM": ("AttentionGradCam", {}),
        "IG": ("IntegratedGradients", {}),
    }


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_of_a_class(alias):
    assert issubclass(method_class("methods", alias), captum.attr.Attribution)


@pytest.mark.parametrize("name", captum_attn.attr.__all__)
def test_a_method_goes_by_the_short_name_that_it_gives_itself(name):
    method = getattr(captum_attn.attr, name)
    if issubclass(method, captum.attr.Attribution) and name != "AttentionAttribution":
        said = method.get_name()
        short = said[said.index("(") + 1 : -1] if "(" in said else said.split()[-1]
        if "(" in said or "-" in short:
            assert list(methods_of("methods", short).values()) == [(name, {})]


def test_captums_names_are_read_without_importing_it():
    assert _of_captum() == captum.attr.__all__


def test_an_unknown_method_lists_what_there_is():
    with pytest.raises(OptionError, match=r"has 'GEA'; did you mean 'GAE'\? captum_attn has AttCA"):
        method_name("--method", "GEA")


def test_the_names_of_the_packages_models():
    assert tuple(LOADERS) == EMBEDDED


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("topic", "no model 'topic'; did you mean 'topics'"),
        ("Digit-ViT", "did you mean 'digit-vit'"),
        ("./my/model", r"no model './my/model': no folder at './my/model'"),
    ],
)
def test_a_near_name_and_a_path_are_not_looked_for_on_the_hub(name, said, monkeypatch):
    monkeypatch.setattr("captum_attn.evaluation.models.only_kept", None)
    with pytest.raises(InputError, match=said):
        load(name)


class Hub:
    """Stands for `huggingface_hub.HfApi`, and counts how often it is asked."""

    asked = 0
    raised: Exception

    def model_info(self, name: str, timeout: float) -> None:
        Hub.asked += 1
        assert timeout <= 5
        raise Hub.raised


@pytest.fixture
def hub(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.asked = 0
    return Hub


@pytest.mark.parametrize("name", ["someone/no-such-model", "timm/vit_tiny_patch16_224"])
def test_a_hub_that_cannot_be_reached_is_asked_once(name, hub, monkeypatch):
    hub.raised = ConnectionError("no route to host")
    start = time.perf_counter()
    with pytest.raises(InputError, match="the hub cannot be reached, so '.*' cannot be fetched"):
        load(name)
    assert hub.asked == 1 and time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["someone/no-such-model", "timm/vit_tiny_patch16_224"])
def test_a_model_that_does_not_exist_is_told_from_that(name, hub):
    httpx = pytest.importorskip("httpx")
    from huggingface_hub.errors import RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    try:
        hub.raised = RepositoryNotFoundError("404", response=response)
    except TypeError:  # of another version
        pytest.skip("this huggingface_hub makes the error otherwise")
    with pytest.raises(InputError, match="the hub has no model"):
        load(name)


def test_offline_nobody_is_asked(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="not in the cache, and HF_HUB_OFFLINE forbids"):
        load("someone/no-such-model")
    assert hub.asked == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["explain-text", "goal", "--model", "topic"],
        ["explain-text", "goal", "--model", "topics", "--method", "Magic"],
        ["evaluate", "--model", "topcis", "--out", "x", "--data", "."],
        ["dashboard", "--models", "cats"],
    ],
)
def test_help_and_names_do_not_wait_for_torch(arguments):
    code = (
        "import sys; from captum_attn.cli.app import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'captum', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == (0 if arguments == ["--help"] else 2), done.stderr
    assert "Traceback" not in done.stderr


def test_names_of_the_package_come_when_they_are_asked_for():
    assert captum_attn.GenericAttention is captum_attn.attr.GenericAttention
    assert set(captum_attn.__all__) <= set(dir(captum_attn))
    with pytest.raises(AttributeError, match="no attribute 'GenericAtention'"):
        _ = captum_attn.GenericAtention
