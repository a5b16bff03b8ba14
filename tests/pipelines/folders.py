"""Tiny checkpoints, written by transformers, with all that a pipeline needs beside the weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tests.scratch import scratch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["the", "man", "plays", "guitar", "in", "paris", "and", "bob", "works", "at", "acme", "good", "bad"]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,  # so that scores differ
}
ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def words() -> transformers.PreTrainedTokenizerFast:
    """BERT's kind of tokenizer: a few words, and pieces of one letter."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    known += [".", ",", "?", "!"]
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(known)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        mask_token="[MASK]",
        model_max_length=40,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def letters(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single characters, which begins no text with a token of its own."""
    known = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(i): i - 29 for i in range(32, 127)}
    backend = tokenizers.Tokenizer(models.WordLevel(known, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        **options,
    )


@functools.cache
def folder() -> Path:
    return scratch("pipelines")


def write(name: str, kind: str, config: Mapping[str, Any], *parts: Any, seed: int = 0) -> Path:
    """A checkpoint of a class of transformers, and `parts` beside it; once for each name."""
    path = folder() / name
    if not path.exists():
        torch.manual_seed(seed)
        model = getattr(transformers, kind)
        model = model(model.config_class(**config)).eval()
        for part in (model, *parts):
            part.save_pretrained(path)
    return path


def bert(head: str, labels: Mapping[int, str] | None = None, **options: Any) -> Path:
    """A tiny BERT with a head, `BertFor{head}` or without one."""
    text = words()
    config = {**SMALL, "vocab_size": len(text), "pad_token_id": 0, **options}
    if labels is not None:
        config |= {"id2label": dict(labels), "label2id": {v: k for k, v in labels.items()}}
    name = f"bert-{head}-{'-'.join((labels or {}).values())}-{options}".replace("/", "")
    return write(name, f"BertFor{head}" if head else "BertModel", config, text)


def llama(kind: str = "LlamaForCausalLM") -> Path:
    """A tiny Llama that reads letters."""
    config = {**SMALL, "vocab_size": 98, "max_position_embeddings": 64, "num_key_value_heads": 2}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return write(kind, kind, config, letters(chat_template=CHAT))


def t5(**tasks: Any) -> Path:
    """A tiny T5, with options of tasks in its config."""
    config = {"vocab_size": 98, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config |= {"task_specific_params": tasks}
    return write(f"t5-{len(tasks)}", "T5ForConditionalGeneration", config, letters())
