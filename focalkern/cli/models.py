"""Configurations of the recipes' models, small models of the same architectures, 64 pairs: without a network.

`plan` counts parameters by the configurations, `train --dry-run` trains the small models on the pairs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# The values of their config.json, for models that ask for an account (Llama, Gemma) or a download.
KNOWN: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": {**_MISTRAL, "rope_theta": 1e6, "sliding_window": None},
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "tie_word_embeddings": False,
    },
    "google/gemma-2-9b-it": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}
_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # at least, for FlexAttention
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512,
}


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """That of a folder or of the Hub's cache; else `KNOWN`; else the Hub's."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name not in KNOWN:
        return AutoConfig.from_pretrained(name, **options)
    try:
        return AutoConfig.from_pretrained(name, **options, local_files_only=True)
    except OSError:
        return AutoConfig.for_model(**KNOWN[name])


def tiny(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The same architecture with few and small layers: softcaps, scales, windows and ties stay."""
    values = config.to_dict()
    values |= {name: size for name, size in _TINY.items() if values.get(name) is not None}
    values.pop("layer_types", None)  # one for each layer: the configuration makes them anew
    values |= {"vocab_size": -(-len(tokenizer) // 8) * 8, "dtype": "float32"}  # shards of equal size
    values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return type(config).from_dict(values)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each byte, BOS before plain text, and a chat template."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    symbols = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_alone = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role[0] }}: {{ message.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, chat_template=template, **special)


def write_tiny(config: PretrainedConfig, folder: Path) -> None:
    """Into `folder`: "model", random weights with a tokenizer, and "data", of 56 pairs and 8 held out."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    # Not by AutoModelForCausalLM: under ZeRO-3 it would give shards.
    small = tiny(config, tokenizer)
    MODEL_FOR_CAUSAL_LM_MAPPING[type(small)](small).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, rows in (("train", pairs()[:-8]), ("test", pairs()[-8:])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def pairs() -> list[dict[str, Any]]:
    """64 sums, right and wrong, in the form of UltraFeedback: a text prompt beside whole conversations."""
    rows = []
    for i in range(64):
        a, b = i % 8, i // 8
        prompt = f"What is {a} plus {b}?"
        answers = (f"{a} plus {b} is {a + b}.", f"I think {a + b + 1}." + " Or more." * (i % 3))
        chosen, rejected = (
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for answer in answers
        )
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
