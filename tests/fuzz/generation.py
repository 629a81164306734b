"""Generated text."""

from __future__ import annotations

from typing import Any

import torch

from captum_attn import GenericAttention
from captum_attn.generation import explain_generation
from tests.fuzz.models import language_model
from tests.fuzz.public import Public

METHOD = GenericAttention(language_model())


def prompt() -> torch.Tensor:
    return torch.tensor([[3, 4, 5]])


def written() -> dict[str, Any]:
    return {"method": METHOD, "inputs": prompt(), "generated": torch.tensor([[3, 4, 5, 6, 7]])}


def writes() -> dict[str, Any]:
    return {"method": METHOD, "inputs": prompt(), "max_new_tokens": 2}


def masked(attention_mask: Any) -> Any:
    inputs = {"input_ids": prompt(), "attention_mask": attention_mask}
    return explain_generation(METHOD, inputs, max_new_tokens=2)


PUBLIC = [
    Public(
        "explain_generation", explain_generation, written,
        {
            "method": "anything", "inputs": "anything", "generated": "anything",
            "with_prompt": "flag-three", "eos_token_id": "anything?-empty_list,a_set,three",
            "objective": "callable?", "start_layer": "index-true", "show_progress": "flag",
        },
        {"inputs": "expected", "generated": "generated"},
    ),
    Public(
        "explain_generation of its own", explain_generation, writes,
        {
            "inputs": "anything", "max_new_tokens": "count-none",
            "generate_kwargs": "mapping?", "eos_token_id": "anything?-empty_list,a_set,three",
        },
        {"inputs": "expected"},
    ),
    Public("a prompt's mask", masked, lambda: {"attention_mask": torch.ones(1, 3)},
           {"attention_mask": "anything?"}, {"attention_mask": "mask"}),
]  # fmt: skip
