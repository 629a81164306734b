"""Folders of images with their masks, and files of text with their labels."""

import re

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from PIL import Image

from captum_attn.errors import InputError
from captum_attn.evaluation import ImageFolder, TextFile, evaluate
from tests.evaluation.models import examples, linear


def read(path):
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file, dtype=np.float32))[None] / 255


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Four of the examples as files."""
    for i, (image, label, mask) in enumerate(examples(4)):
        save(tmp_path / f"images/{label}/{i}.png", image[0] * 255)
        save(tmp_path / f"masks/{label}/{i}.png", mask.int() * (1 + 60 * i))
    return tmp_path


def test_pictures_and_masks_meet_by_their_paths(folder):
    data = ImageFolder(folder / "images", read, folder / "masks")
    order = sorted(range(4), key=lambda i: (str(examples(4)[i][1]), i))
    for place, i in enumerate(order):
        image, label, mask = data[place]
        expected = examples(4)[i]
        assert torch.allclose(image, expected[0], atol=1 / 255) and label == expected[1]
        assert (mask == expected[2]).all()
    rows = [data[i] for i in range(4)]
    methods, what = {"m": InputXGradient}, ["segmentation", "aopc"]
    from_files, from_rows = (
        evaluate(linear(), d, methods, what, batch_size=3, show_progress=False, resamples=200)
        for d in (data, rows)
    )
    for column in from_rows.columns:
        assert from_files.values(column) == from_rows.values(column)


def test_classes_by_number_by_name_or_in_order(tmp_path):
    for name in ("10", "9"):
        save(tmp_path / f"numbers/{name}/a.png", np.zeros((2, 2)))
    for name in ("cat", "ant"):
        save(tmp_path / f"names/{name}/deep/a.png", np.zeros((2, 2)))
    save(tmp_path / "flat/a.png", np.zeros((2, 2)))
    assert ImageFolder(tmp_path / "numbers", read).labels == [10, 9]
    assert ImageFolder(tmp_path / "names", read).labels == [0, 1]
    assert ImageFolder(tmp_path / "names", read, classes={"cat": 4, "ant": 7}).labels == [7, 4]
    flat = ImageFolder(tmp_path / "flat", read)
    assert flat.labels is None and flat.collate_fn([flat[0]]).target is None
    with pytest.raises(InputError, match="the class 'cat' is none of the model's"):
        ImageFolder(tmp_path / "names", read, classes={"ant": 7})
    save(tmp_path / "names/a.png", np.zeros((2, 2)))
    with pytest.raises(InputError, match="in no sub-folder, but others are"):
        ImageFolder(tmp_path / "names", read)


def test_what_is_wrong_with_a_folder(folder):
    with pytest.raises(InputError, match="no folder at"):
        ImageFolder(folder / "image", read)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="has no pictures"):
        ImageFolder(folder / "empty", read)
    with pytest.raises(InputError, match="no folder at"):
        ImageFolder(folder / "images", read, folder / "mask")
    path = next((folder / "masks").rglob("0.png"))
    save(path, np.ones((3, 4)))
    data = ImageFolder(folder / "images", read, folder / "masks")
    with pytest.raises(InputError, match=r"0.png' is \(3, 4\), but .*0.png' is \(4, 4\)"):
        [data[i] for i in range(4)]
    path.unlink()
    with pytest.raises(InputError, match=r"has no mask for '\d.0' \(1 of 4"):
        ImageFolder(folder / "images", read, folder / "masks")
    picture = next((folder / "images").rglob("1.png"))
    picture.write_bytes(picture.read_bytes()[:40])
    data = ImageFolder(folder / "images", read)
    with pytest.raises(InputError, match="cannot read '.*1.png' as a picture"):
        [data[i] for i in range(4)]


class Tokenizer:
    """Words by their length, between two special tokens."""

    is_fast = True

    def __call__(self, texts, **options):
        rows = [[1, *(len(word) + 2 for word in text.split()), 2] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        found = {"input_ids": ids, "attention_mask": (ids > 0).long(),
                 "special_tokens_mask": (ids <= 2).long()}  # fmt: skip
        if options.get("return_offsets_mapping"):
            found["offset_mapping"] = torch.zeros(*ids.shape, 2, dtype=torch.long)
            for row, text in zip(found["offset_mapping"], texts, strict=True):
                for k, word in enumerate(re.finditer(r"\S+", text), 1):
                    row[k] = torch.tensor(word.span())
        return found


def test_marked_words(tmp_path):
    """All places of a phrase are marked; parts of words, special tokens and padding are not."""
    path = tmp_path / "a.tsv"
    path.write_text("a\tthe red cat sat on the cat\tcat, red cat\nb\tcats sit, often.\toften\n")
    data = TextFile(path, Tokenizer(), {"a": 0, "b": 1})
    batch = data.collate_fn([data[0], data[1]])
    marked = batch.truth["rationales"].int().tolist()
    assert marked == [[0, 0, 1, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0]]
    counted = batch.truth["rationale_mask"].int().tolist()
    assert counted == [[0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    for text, said in (
        ("a\tcats sit\tcat", "line 1 .* expected words of the text to be marked, got 'cat'"),
        ("a\tcats\tcats\nb\tsit", "line 2 .* the words that are marked, as in the other lines"),
        ("a\tb\tb\tb", "line 1"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            TextFile(path, Tokenizer())
    path.write_text("a\tcats\tcats\n")
    slow = Tokenizer()
    slow.is_fast = False
    with pytest.raises(InputError, match="expected a fast tokenizer"):
        TextFile(path, slow)


def test_lines_of_text(tmp_path):
    (tmp_path / "a.tsv").write_text("good\tone two\n\nbad\tthree  \n", encoding="utf-8")
    data = TextFile(tmp_path / "a.tsv", Tokenizer(), {"bad": 0, "good": 1})
    batch = data.collate_fn([data[0], data[1]])
    assert batch.target.tolist() == [1, 0]
    assert batch.inputs["input_ids"].tolist() == [[1, 5, 5, 2], [1, 7, 2, 0]]
    assert batch.options["removable"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    (tmp_path / "b.txt").write_text("one two\nthree\n")
    plain = TextFile(tmp_path / "b.txt", Tokenizer())
    assert plain.labels is None and plain.texts == ["one two", "three"]
    for text, said in (("good\tx\nbad", "line 2"), ("\n", "is empty"), ("a\t\nb\tx", "line 1")):
        (tmp_path / "c.txt").write_text(text)
        with pytest.raises(InputError, match=said):
            TextFile(tmp_path / "c.txt", Tokenizer())
    with pytest.raises(InputError, match="cannot read"):
        TextFile(tmp_path / "no.txt", Tokenizer())
