"""``captum-attn demo`` as a user meets it: what it writes, and one line for every mistake."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from captum_attn.cli.app import run
from captum_attn.demo.image import explain_pictures, load_picture
from captum_attn.demo.text import explain_texts, integrated_gradients
from captum_attn.errors import InputError
from captum_attn.toy.digit_vit import load_digit_vit
from captum_attn.toy.scenes import scenes
from captum_attn.toy.topics import load_topic_classifier

METHODS = [
    "RawAttention", "AttentionRollout", "GenericAttention", "AttnLRP", "IntegratedGradients",
]  # fmt: skip


class Page(HTMLParser):
    """Collects tags, attributes and text, and that every tag is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Everything the demo writes by default, and what it prints."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = [sys.executable, "-c", "from captum_attn.cli import main; main()"]
    done = subprocess.run(
        [*command, "demo", "--out", str(out)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_the_demo_writes_pictures_and_a_page(written):
    out, printed = written
    names = {path.name for path in out.iterdir()}
    kinds = {"text": 4, "scene": 3, "detection": 2, "question": 4}
    pictures = {f"{kind}_{i}.png" for kind, n in kinds.items() for i in range(1, n + 1)}
    assert names == {"index.html"} | pictures
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5
    assert (out / "index.html").resolve().as_uri() in printed
    for method in METHODS:
        rows = re.findall(rf"^  {method} +\d+\.\d{{3}} +\d\.\d{{3}}$", printed, re.M)
        # GAE answers questions, too; relevance propagation explains texts and scenes alone.
        assert len(rows) == {"GenericAttention": 4, "AttnLRP": 2}.get(method, 3), method


@pytest.mark.slow
def test_the_page_stands_alone(written):
    out, _ = written
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert not page.open
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "why music?" in page.text and "why travel?" in page.text
    assert "A scene in which it finds a 4 and a 7" in page.text
    assert "The band toured Europe by train and played in small villages." in page.text


def test_class_specific_methods_move_with_the_question():
    text = "The band toured Europe by train and played in small villages."
    (case,) = explain_texts(load_topic_classifier(), [text])
    assert [question.asked for question in case.questions] == ["why music?", "why travel?"]
    music, travel = (
        {e.method: {w.text: w.relevance for w in e.words} for e in question.explanations}
        for question in case.questions
    )
    for method in ("RawAttention", "AttentionRollout"):
        assert music[method] == pytest.approx(travel[method])
    gae_music, gae_travel = music["GenericAttention"], travel["GenericAttention"]
    assert max(gae_music, key=gae_music.__getitem__) == "band"
    assert max(gae_travel, key=gae_travel.__getitem__) == "toured"
    assert min(*gae_music.values(), *gae_travel.values()) >= 0


def test_own_text_and_labels(tmp_path, capsys):
    text = 'A <b>soprano</b> & "tenor" sang'
    arguments = ["demo", "--no-images", "--out", str(tmp_path)]
    assert run([*arguments, "--labels", "football, opera", "--text", text]) == 0
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert text in page.text and "why opera?" in page.text
    assert "Text (1 question)" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "text_1.png"}


def test_own_picture(tmp_path, capsys):
    scene = scenes(1, split="test", seed=0).images[0, 0]
    ink_on_paper = Image.fromarray((255 * (1 - scene.numpy())).astype(np.uint8))
    file = tmp_path / "my <picture>.png"
    ink_on_paper.resize((640, 640)).save(file)
    out = tmp_path / "out"
    assert run(["demo", "--no-text", "--image", str(file), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "picture_1.png"}
    assert "Your my <picture>.png" in Page((out / "index.html").read_text()).text
    shown = load_picture(file)
    torch.testing.assert_close(shown[0, 0], scene, atol=0.15, rtol=0)
    case = next(explain_pictures(load_digit_vit(), [file]))
    asked = [question.asked for question in case.questions]
    assert asked and set(asked) <= {f"why {digit}?" for digit in range(10)}


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out in ("", "Loading the models ...\n")
    assert captured.err.startswith("captum-attn: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--imge", "x.png"], "No such option: --imge"),
        (["dmeo"], "No such command 'dmeo'"),
        (["demo", "extra"], "unexpected extra argument"),
        (["demo", "--image"], "requires an argument"),
        (["demo", "--image", "no/such.png"], "no picture at 'no/such.png'; give the path"),
        (["demo", "--image", "."], "no picture at '.'"),
        (["demo", "--labels", "sport"], "at least two different topics"),
        (["demo", "--labels", ""], "at least two different topics"),
        (["demo", "--text", ""], "has no words"),
        (["demo", "--no-text", "--text", "goal"], "leave out --no-text"),
        (["demo", "--no-images", "--image", "x.png"], "leave out --no-images"),
        (["demo", "--no-text", "--no-images"], "nothing to do"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    assert said in one_line(capsys)


def test_a_file_in_the_place_of_the_directory(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "give --out a directory" in one_line(capsys)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", png_header(8, 8), png_header(100_000, 100_000), b"%!PS-Adobe-3.0 EPSF"],
    ids=["empty", "text", "cut short", "bomb", "postscript"],
)
def test_an_unreadable_picture_is_one_line(content, tmp_path, capsys):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    assert run(["demo", "--no-text", "--image", str(file), "--out", str(tmp_path / "o")]) == 2
    assert "as an image" in one_line(capsys)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_every_mode_are_read(mode, tmp_path):
    grey = np.zeros((50, 100), dtype=np.uint8)
    grey[20:30, 40:60] = 255
    picture = Image.fromarray(grey)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        picture = Image.fromarray(grey.astype(kind) * 100)
    else:
        picture = picture.convert("RGB").convert(mode) if mode == "CMYK" else picture.convert(mode)
    file = tmp_path / "picture.tiff"
    picture.save(file)
    pixels = load_picture(file)
    assert pixels.shape == (1, 1, 64, 64) and pixels.dtype == torch.float32
    # 100 x 50 becomes 64 x 32 in the middle; the ink keeps its place and its aspect ratio.
    assert pixels[0, 0, 31:33, 28:36].min() > 0.9
    assert pixels[0, 0, :28].max() < 0.1 and pixels[0, 0, :, :24].max() < 0.1


def test_a_transparent_ground_counts_as_paper(tmp_path):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (20, 20, 40, 40))
    picture.save(tmp_path / "ink.png")
    pixels = load_picture(tmp_path / "ink.png")
    assert pixels[0, 0, 30, 30] > 0.9 and pixels[0, 0, 5, 5] < 0.1


def test_not_finite_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(InputError, match="not finite"):
        load_picture(tmp_path / "nan.tiff")


@pytest.mark.parametrize("arguments", [["--help"], [], ["demo", "--help"]])
def test_help_reads_well(arguments, capsys):
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: captum-attn")
    assert not re.search(r"[│╭\x1b]", shown)
    if "demo" in arguments:
        options = ["--out", "--text", "--labels", "--image", "--no-text", "--no-images"]
        assert all(option in shown for option in options)


@pytest.mark.parametrize("package", ["typer", "timm", "sklearn"])
def test_a_missing_extra_is_one_line(package, tmp_path):
    script = (
        f"import sys; sys.modules[{package!r}] = None; from captum_attn.cli import main; main()"
    )
    arguments = ["demo", "--no-text", "--out", str(tmp_path / "o")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"captum-attn: {package}") and line.endswith(
        'pip install "captum_attn[demo]"'
    )
    assert "Traceback" not in done.stderr


def test_integrated_gradients_of_a_text_are_complete():
    """They add up to the difference of the logits between the text and the [PAD] text."""
    model = load_topic_classifier()
    encoding = model.tokenize("Parliament voted on the budget.")
    blank = {name: ids.clone() for name, ids in encoding.items()}
    blank["input_ids"][0, 1:-1] = model.tokenizer.pad_token_id
    with torch.no_grad():
        difference = (model(**encoding) - model(**blank))[0, 2]
    total = integrated_gradients(model, encoding, target=2).sum()
    assert total.item() == pytest.approx(difference.item(), rel=0.05)
