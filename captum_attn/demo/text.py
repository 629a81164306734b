"""Why is this text about sport? Texts, each asked about the topics that the model sees in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from captum.attr import Attribution, LayerIntegratedGradients
from torch import Tensor

from captum_attn import AttentionRollout, AttnLRP, GenericAttention, RawAttention
from captum_attn.demo.explanation import Case, Question, explain
from captum_attn.toy.topics import (
    TEXTS,
    TopicClassifier,
    check_text,
    content_tokens,
    keep_tokens,
    merge_word_pieces,
)

METHODS: dict[type[Attribution], dict[str, bool]] = {
    RawAttention: {},
    AttentionRollout: {},
    # The mean reads every token, so each is relevant to itself by merely being there. Like the
    # authors of GAE for display, leave that out.
    GenericAttention: {"discard_self": True},
    AttnLRP: {},
}
ASKED_FROM = 0.2  # probability from which a second topic is asked about, too


def explain_texts(model: TopicClassifier, texts: Sequence[str] = TEXTS) -> Iterator[Case]:
    """Texts, each asked about its likeliest topic, and the second if it is likely as well.

    Args:
        model (TopicClassifier): the classifier.
        texts (sequence of str, optional): the texts. Default: ``TEXTS``.

    Returns:
        iterator of Case: computed one by one; the texts are checked at once.

    Examples::

        >>> case = next(explain_texts(load_topic_classifier()))
        >>> [question.asked for question in case.questions]
        ['why music?', 'why travel?']
    """
    for text in texts:
        check_text(model, text)
    return (_case(model, text, f"text_{i}") for i, text in enumerate(texts, 1))


def _case(model: TopicClassifier, text: str, name: str) -> Case:
    with torch.no_grad():
        likely = model(**model.tokenize(text))[0].softmax(0).topk(2)
    asked = [int(likely.indices[0])]
    if likely.values[1] >= ASKED_FROM:
        asked.append(int(likely.indices[1]))
    questions = [_question(model, text, target) for target in asked]
    return Case(name, f"“{text}”", questions, text=text)


def _question(model: TopicClassifier, text: str, target: int) -> Question:
    encoding = model.tokenize(text)
    content = content_tokens(encoding)  # special tokens are neither removed nor coloured

    def attribute(attributor: Attribution, options: dict[str, bool]) -> Tensor:
        return attributor.attribute(encoding, target=target, **options)["input_ids"][0].detach()

    calls = {
        method.__name__: partial(attribute, method(model), options)
        for method, options in METHODS.items()
    }
    # Ids cannot be interpolated; Captum's way is to do it behind the embedding.
    calls["IntegratedGradients"] = partial(integrated_gradients, model, encoding, target)

    def probability(keep_content: Tensor) -> Tensor:
        keep = torch.ones(len(keep_content), len(content), dtype=torch.bool)
        keep[:, content] = keep_content
        return model(**keep_tokens(keep, encoding)).softmax(1)[:, target]

    explanations, chance = explain(calls, probability, lambda r: r[content])
    explanations = [
        e._replace(words=tuple(merge_word_pieces(text, encoding, e.relevance)))
        for e in explanations
    ]
    with torch.no_grad():
        intact = float(model(**encoding).softmax(1)[0, target])
    return Question(f"why {model.labels[target]}?", intact, explanations, chance)


def integrated_gradients(
    model: TopicClassifier, encoding: dict[str, Tensor], target: int
) -> Tensor:
    """Captum's Integrated Gradients on the word embeddings, from a text of [PAD] tokens.

    Args:
        model (TopicClassifier): the classifier.
        encoding (Mapping): the tokenizer's output for one text.
        target (int): index of the topic.

    Returns:
        Tensor: ``(n,)``, relevance of every token, signed.

    Examples::

        >>> model = load_topic_classifier()
        >>> integrated_gradients(model, model.tokenize("goal"), target=0).shape
        torch.Size([3])
    """
    ids = encoding["input_ids"]
    content = content_tokens(encoding)
    blank = torch.where(content, torch.full_like(ids, model.tokenizer.pad_token_id), ids)
    gradients = LayerIntegratedGradients(model, model.encoder.get_input_embeddings())
    attributions = gradients.attribute(
        ids,
        baselines=blank,
        target=target,
        additional_forward_args=(encoding["attention_mask"],),
    )
    return attributions[0].sum(-1).detach()
