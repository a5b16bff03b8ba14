"""Pipelines over encoder-decoders and of question answering: transformers has no such pipelines any more, so
beside its models, called as its fourth release did."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import pytest
import torch
import transformers

import taut
from taut.errors import RequestError
from tests.pipelines.folders import SMALL, bert, letters, t5, words, write
from tests.pipelines.test_text import same

TEXTS = ["hello", "a longer text to shorten", ""]
SPECIFIC = {
    "summarization": {"prefix": "summarize: ", "num_beams": 2, "max_length": 9, "min_length": 4},
    "translation_en_to_fr": {"prefix": "translate English to French: ", "max_length": 8},
}


@functools.cache
def reference(folder: Any) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)


def wanted(folder: Any, name: str, text: str, **options: Any) -> list[dict[str, Any]]:
    """What the model of transformers says to a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    rows = reference(folder).generate(ids, **options)
    return [{f"{name}_text": tokenizer.decode(row, skip_special_tokens=True)} for row in rows]


@pytest.mark.parametrize(
    ("task", "name", "prefix", "options"),
    [
        ("text2text-generation", "generated", "", {"num_beams": 4, "max_new_tokens": 7}),
        ("summarization", "summary", "summarize: ", SPECIFIC["summarization"]),
        (
            "translation_en_to_fr",
            "translation",
            "translate English to French: ",
            {"num_beams": 4, **SPECIFIC["translation_en_to_fr"]},
        ),
        ("translation", "translation", "", {"num_beams": 4, "max_new_tokens": 7}),
    ],
)
def test_encoder_decoders_say_what_those_of_transformers_say(task, name, prefix, options):
    folder = t5(**SPECIFIC)
    given = {} if "max_length" in options else {"max_new_tokens": 7}
    options = {key: value for key, value in options.items() if key != "prefix"}
    pipe = taut.pipeline(task, folder, device="cpu", **given)
    texts = TEXTS if prefix else TEXTS[:2]
    want = [wanted(folder, name, prefix + text, **options) for text in texts]
    same(pipe(texts), [one[0] for one in want])
    same(pipe(texts[0]), want[0])
    same(list(pipe(iter(texts))), want)
    if not prefix:
        return
    two = wanted(folder, name, prefix + texts[0], **{**options, "num_beams": 2, "num_return_sequences": 2})
    same(pipe(texts[:1], num_beams=2, num_return_sequences=2), [two])
    ids = pipe(texts[0], return_tensors=True)[0][f"{name}_token_ids"]
    assert ids[0] == 0 and pipe.tokenizer.decode(ids, skip_special_tokens=True) == want[0][0][f"{name}_text"]
    assert pipe.task == task


def test_defaults_are_those_of_the_fourth_release():
    pipe = taut.pipeline(model=t5(**SPECIFIC), device="cpu")
    assert pipe.task == "text2text-generation"
    assert pipe.generation(pipe.defaults) == {"max_new_tokens": 256, "num_beams": 4}
    config = taut.GenerationConfig(num_beams=3, max_length=9)
    settings = pipe.parse({"generation_config": config}, pipe.defaults)
    assert pipe.generation(settings) == {"generation_config": config}
    with pytest.raises(RequestError, match="the text is empty, and the tokenizer adds no token"):
        pipe("")
    with pytest.raises(RequestError, match="src_lang and tgt_lang are for models of several languages"):
        taut.pipeline("translation", t5(**SPECIFIC), tgt_lang="fr")("a")


@pytest.fixture(scope="module")
def mbart(tmp_path_factory):
    """An mBART whose tokenizer of letters knows three languages."""
    text = letters(additional_special_tokens=["en_XX", "fr_XX", "de_DE"])
    config = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    config |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.4}
    config |= {"vocab_size": 101, "max_position_embeddings": 30, "decoder_start_token_id": 2}
    config |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}
    folder = tmp_path_factory.mktemp("mbart") / "model"
    shutil.copytree(write("mbart", "MBartForConditionalGeneration", config, text), folder)
    own = json.loads((folder / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "MBart50Tokenizer", "src_lang": "en_XX"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    return folder


@pytest.mark.parametrize(
    ("task", "options", "source", "target"),
    [
        ("translation", {"tgt_lang": "fr_XX"}, "en_XX", "fr_XX"),
        ("translation", {"src_lang": "de_DE", "tgt_lang": "en"}, "de_DE", "en_XX"),
        ("translation_fr_to_de", {}, "fr_XX", "de_DE"),
        ("translation_fr_to_de", {"src_lang": "en_XX", "tgt_lang": "de_DE"}, "en_XX", "de_DE"),
    ],
)
def test_models_of_several_languages_translate_as_they_are_told(mbart, task, options, source, target):
    pipe = taut.pipeline(task, mbart, device="cpu", num_beams=2, max_new_tokens=6)
    codes = pipe.tokenizer.lang_code_to_id
    ids = [codes[source], *pipe.tokenizer.encode("hello", add_special_tokens=False), 2]
    model = transformers.MBartForConditionalGeneration.from_pretrained(mbart)
    row = model.generate(
        torch.tensor([ids]), num_beams=2, max_new_tokens=6, forced_bos_token_id=codes[target]
    )[0]
    found = pipe("hello", return_tensors=True, **options)[0]["translation_token_ids"]
    assert found == row.tolist() and found[1] == codes[target]
    assert pipe.tokenizer.src_lang == "en_XX"
    assert pipe.tokenizer.encode("a")[0] == codes["en_XX"]


def test_languages_and_lengths_that_there_are_not_are_named(mbart):
    pipe = taut.pipeline("translation", mbart, device="cpu", max_new_tokens=3)
    with pytest.raises(RequestError, match=r"translation needs tgt_lang; known: .*en_XX"):
        pipe("a")
    with pytest.raises(RequestError, match=r"tgt_lang is 'xx'; known: .*en_XX"):
        pipe("a", tgt_lang="xx")
    with pytest.raises(RequestError, match="has positions for 30; pass truncation=True"):
        pipe("a" * 50, tgt_lang="fr")
    assert pipe("a" * 50, tgt_lang="fr", truncation=True)


CONTEXT = "bob works at acme in paris and the man plays guitar."
QUESTION = "the man plays?"


def answers(question: str, context: str, longest: int = 15) -> list[dict[str, Any]]:
    """Every answer in a context of one window, the best first, by its definition."""
    tokenizer, folder = words(), bert("QuestionAnswering")
    model = transformers.BertForQuestionAnswering.from_pretrained(folder)
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    inside = torch.tensor([which == 1 for which in encoded.sequence_ids(0)])
    inside[0] = True  # no answer begins there, but it has its share
    output = model(**encoded)
    start, end = (
        logits[0].masked_fill(~inside, -torch.inf).softmax(0).tolist()
        for logits in (output.start_logits, output.end_logits)
    )
    found = {}
    for first in range(1, len(start)):
        for last in range(first, min(first + longest, len(start))):
            begin, stop = offsets[first][0], offsets[last][1]
            while begin and context[begin - 1].isalpha() and context[begin].isalpha():
                begin -= 1
            while stop < len(context) and context[stop].isalpha() and context[stop - 1].isalpha():
                stop += 1
            score = start[first] * end[last]
            if score > found.get((begin, stop), 0):
                found[begin, stop] = score
    return [
        {"score": score, "start": begin, "end": stop, "answer": context[begin:stop]}
        for (begin, stop), score in sorted(found.items(), key=lambda pair: -pair[1])
    ]


def test_questions_are_answered_by_the_likeliest_spans():
    pipe = taut.pipeline("question-answering", bert("QuestionAnswering"), device="cpu")
    item = {"question": QUESTION, "context": CONTEXT}
    want = answers(QUESTION, CONTEXT)
    same(pipe(item), want[0])
    same(pipe(question=QUESTION, context=CONTEXT, top_k=3), want[:3])
    same(pipe(QUESTION, CONTEXT, max_answer_len=2), answers(QUESTION, CONTEXT, 2)[0])
    same(pipe(question=[QUESTION, "bob?"], context=CONTEXT), [want[0], answers("bob?", CONTEXT)[0]])
    same(list(pipe(iter([item, item]))), [want[0], want[0]])


def test_long_contexts_are_read_in_windows_that_overlap():
    pipe = taut.pipeline("question-answering", bert("QuestionAnswering"), device="cpu")
    long = " ".join([CONTEXT] * 6)
    found = pipe(QUESTION, long, top_k=40, doc_stride=6)
    assert all(one["answer"] == long[one["start"] : one["end"]] for one in found)
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True) and len({(a["start"], a["end"]) for a in found}) == 40
    assert max(one["end"] for one in found) > len(CONTEXT)
    nothing = pipe(QUESTION, long, top_k=9999, handle_impossible_answer=True)
    assert [one["start"] for one in nothing if one["answer"] == ""] == [0]
    with pytest.warns(UserWarning, match="item 0: the context is empty"):
        results = pipe([{"question": "a", "context": " "}, {"question": QUESTION, "context": CONTEXT}])
    same(results[1], answers(QUESTION, CONTEXT)[0])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"question": "a"}, {}, "takes a dict of question and context"),
        ("a", {}, "needs a question and a context"),
        (None, {"question": ["a", "b"], "context": ["c"]}, "there are 2 questions and 1 contexts"),
        (None, {"question": "a", "context": "b", "top_k": 0}, "top_k is 0"),
        (None, {"question": "a", "context": "b", "max_seq_len": 3}, "max_seq_len is 3: .* leave no room"),
        (None, {"question": "a", "context": "b", "doc_stride": 50}, "doc_stride is 50"),
    ],
)
def test_bad_questions_are_named(inputs, options, message):
    pipe = taut.pipeline("question-answering", bert("QuestionAnswering"), device="cpu")
    with pytest.raises(taut.TautError, match=message):
        pipe(inputs, **options)


assert SMALL["max_position_embeddings"] == 40  # what the texts above are long for
