"""Whisper's tokenizer and processor, as in transformers: what texts begin with, and times in them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import taut
from taut.errors import RequestError, TautError, TokenizerError
from taut.tokenizer import AutoTokenizer
from taut.tokenizer.languages import LANGUAGES, code_of
from tests.processor.media import sound
from tests.tokenizer.conftest import CORPUS, TEXTS
from tests.tokenizer.test_against_transformers import assert_equal

SPECIAL = [
    "<|startoftranscript|>",
    *(f"<|{code}|>" for code in list(LANGUAGES)[:99]),
    *("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"),
    "<|notimestamps|>",
]


@pytest.fixture(scope="module", params=["times in the vocabulary", "none there"])
def made(request, tmp_path_factory):
    """A folder as Whisper's are, and transformers' processor of it."""
    folder = tmp_path_factory.mktemp("whisper")
    return whisper_files(folder, times=request.param == "times in the vocabulary"), folder


def whisper_files(folder: Path, *, times: bool):
    """Writes a tiny processor as Whisper's are, and gives it in transformers."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    vocabulary, merges = (folder / name for name in ("vocab.json", "merges.txt"))
    backend.model.save(str(folder))
    pairs = [tuple(line.split(" ")) for line in merges.read_text().splitlines()[1:]]
    theirs = transformers.WhisperTokenizer(
        vocab=json.loads(vocabulary.read_text()),
        merges=pairs,
        extra_special_tokens=SPECIAL,
        pad_token="<|endoftext|>",
    )
    if times:
        theirs.add_tokens([AddedToken(f"<|{at * 0.02:.2f}|>", special=False) for at in range(1501)])
    for file in (vocabulary, merges):
        file.unlink()
    processor = transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(chunk_length=1), theirs)
    processor.save_pretrained(folder)
    return processor


def test_texts_begin_as_they_are_told(made, tmp_path):
    processor, folder = made
    ours, theirs = taut.AutoProcessor.from_pretrained(folder).tokenizer, processor.tokenizer
    for options in (
        {},
        {"language": "spanish", "task": "transcribe"},
        {"language": "de", "predict_timestamps": True},
        {"task": "translate", "predict_timestamps": False},
    ):
        ours.set_prefix_tokens(**options)
        theirs.set_prefix_tokens(**options)
        assert ours.prefix_tokens == theirs.prefix_tokens
        for text in TEXTS:
            assert_equal(ours(text), theirs(text))
        assert_equal(ours("one", "two"), theirs("one", "two"))
    want = theirs.get_decoder_prompt_ids(language="french", task="transcribe")
    assert ours.get_decoder_prompt_ids(language="french", task="transcribe") == want
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.language, again.task, again.predict_timestamps) == ("french", "transcribe", False)
    back = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("hello")["input_ids"] == back("hello")["input_ids"] == theirs("hello")["input_ids"]
    told = AutoTokenizer.from_pretrained(folder, language="Hindi", task="translate")
    assert told.convert_ids_to_tokens(told.prefix_tokens)[1:3] == ["<|hi|>", "<|translate|>"]


def transcripts(tokenizer) -> list[list[int]]:
    """Rows of words and times, of one window and of several, some behind a prompt."""
    draw, begin, rows = random.Random(1), tokenizer.timestamp_begin, []
    words = [token for text in CORPUS[:3] for token in tokenizer.encode(text, add_special_tokens=False)]
    for _ in range(60):
        row = list(tokenizer.prefix_tokens) if draw.random() < 0.7 else []
        if draw.random() < 0.3:
            row = [*tokenizer.get_prompt_ids("so far", None), *tokenizer.prefix_tokens]
        for _ in range(draw.randrange(4)):
            time = 0
            for _ in range(draw.randrange(4)):
                row += [begin + time, *draw.sample(words, draw.randrange(1, 4))]
                time += draw.randrange(1, 300)
                row += [begin + time] if draw.random() < 0.9 else []
        rows.append([*row, tokenizer.eos_token_id])
    return rows


def test_texts_with_times_and_without(made):
    processor, folder = made
    ours, seen = taut.AutoProcessor.from_pretrained(folder), set()
    for row in transcripts(ours.tokenizer):
        for options in (
            {},
            {"skip_special_tokens": True},
            {"decode_with_timestamps": True},
            {"decode_with_timestamps": True, "skip_special_tokens": True},
            {"output_offsets": True, "skip_special_tokens": True},
            {"output_offsets": True, "time_precision": 0.04},
        ):
            want = processor.tokenizer.decode(row, **options)
            got = ours.decode(torch.tensor(row), **options)
            assert got == want, (row, options)
            assert ours.batch_decode([row, row], **options) == [want] * 2
            if options.get("output_offsets"):
                seen.add(len(got["offsets"]))
    assert len(seen) > 3


def test_prompts(made):
    processor, folder = made
    ours = taut.AutoProcessor.from_pretrained(folder)
    for text in ("the lazy dog", "  Köln "):
        want = processor.get_prompt_ids(text)
        got = ours.get_prompt_ids(text)
        assert (got == want).all() and got.dtype == want.dtype
        assert ours.get_prompt_ids(text, return_tensors="pt").tolist() == want.tolist()
    with pytest.raises(TokenizerError, match=r"a prompt can't have <\|en\|> in it: 'a <\|en\|> b'"):
        ours.get_prompt_ids("a <|en|> b")


def test_sounds_and_labels(made):
    processor, folder = made
    ours, clips = taut.AutoProcessor.from_pretrained(folder), [sound(4000), sound(9000)]
    options = {"sampling_rate": 16000, "return_tensors": "pt", "padding": "max_length", "max_length": 16000}
    got, want = (made(audio=clips, **options) for made in (ours, processor))
    assert (got["input_features"] - want["input_features"]).abs().max() < 1e-4
    for part in (ours.tokenizer, processor.tokenizer):
        part.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=True)
    assert ours(text="hello")["input_ids"] == processor(text="hello")["input_ids"]
    both = ours(audio=clips, text=["hello"], sampling_rate=16000)
    assert both["labels"] == [ours(text="hello")["input_ids"]]
    assert type(ours) is taut.processor.WhisperProcessor


def test_files_of_older_folders(made, tmp_path: Path):
    """`vocab.json`, `merges.txt` and `added_tokens.json`."""
    processor, _ = made
    theirs = processor.tokenizer
    theirs.save_vocabulary(str(tmp_path))
    added = {str(t): i for i, t in theirs.added_tokens_decoder.items() if i >= len(theirs._vocab)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    settings = {"tokenizer_class": "WhisperTokenizer", "additional_special_tokens": SPECIAL}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = AutoTokenizer.from_pretrained(tmp_path, language="en", task="transcribe")
    theirs.set_prefix_tokens(language="en", task="transcribe", predict_timestamps=False)
    for text in TEXTS[:8]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_languages():
    from transformers.models.whisper import tokenization_whisper as oracle

    assert dict(LANGUAGES) == oracle.LANGUAGES
    for name, code in oracle.TO_LANGUAGE_CODE.items():
        assert code_of(name.title()) == code_of(code) == code_of(f"<|{code}|>") == code
    with pytest.raises(RequestError, match="language is 'xx'; known: en, zh"):
        code_of("xx")


def test_bad_settings_are_named(made):
    _, folder = made
    for options, message in (
        ({"task": "sing"}, "task is 'sing'; known: transcribe, translate"),
        ({"language": "klingon"}, "language is 'klingon'; known: english"),
        ({"language": "yue"}, r"the vocabulary has no <\|yue\|>"),
        ({"src_lang": "en_XX"}, "src_lang is an option of MBart50Tokenizer"),
    ):
        with pytest.raises(TautError, match=message):
            AutoTokenizer.from_pretrained(folder, **options)
