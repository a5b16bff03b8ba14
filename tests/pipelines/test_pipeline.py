"""What every pipeline does with its inputs: order, windows, batches, errors of single items, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import taut
from taut.errors import RequestError
from taut.pipelines import ItemError, KeyDataset, KeyPairDataset
from tests.pipelines.folders import llama
from tests.pipelines.test_text import CHAT, GREEDY, MASKED, NAMED, TEXTS, ours, same

TASKS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "text-classification": (TEXTS, {}),
    "zero-shot-classification": (TEXTS, {"candidate_labels": "bob, paris"}),
    "token-classification": (NAMED, {"aggregation_strategy": "simple"}),
    "fill-mask": (MASKED, {}),
    "feature-extraction": (TEXTS, {}),
    "text-generation": (["a", CHAT, "", "the longest of the prompts"], GREEDY),
}


class Examples:
    """A dataset that can only be indexed."""

    def __init__(self, items: list[Any]):
        self.items = [{"text": item, "pair": "bob"} for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize("task", TASKS)
def test_an_item_gives_the_same_alone_in_batches_and_from_every_kind_of_source(task):
    items, options = TASKS[task]
    pipe = ours(task)
    alone = [pipe(item, **options) for item in items]
    if task == "text-classification":
        alone = [one[0] for one in alone]
    same(pipe(items, **options), alone)
    same(pipe(items, batch_size=2, num_workers=2, **options), alone)
    from_generator = pipe((item for item in items), **options)
    assert isinstance(from_generator, Iterator)
    same(list(from_generator), alone)
    same(list(pipe(KeyDataset(Examples(items), "text"), **options)), alone)
    assert pipe([], **options) == []


def test_pairs_come_from_two_columns():
    pipe, items = ours("text-classification"), Examples(TEXTS)
    want = [pipe({"text": text, "text_pair": "bob"}) for text in TEXTS]
    same(list(pipe(KeyPairDataset(items, "text", "pair"))), want)


def test_a_generator_is_read_a_window_ahead(monkeypatch):
    pipe, read = ours("text-classification"), []
    monkeypatch.setattr(pipe, "window", 3)

    def source() -> Iterator[str]:
        for index in range(8):
            read.append(index)
            yield "a" * index

    results = pipe(source())
    assert not read
    for done, _ in enumerate(results):
        assert len(read) == min(3 * (done // 3 + 1), 8)


def test_items_are_computed_longest_first_in_batches_of_so_many_tokens(monkeypatch):
    pipe, seen = ours("feature-extraction"), []
    compute = type(pipe).compute

    def watched(self: Any, pieces: Any, settings: Any) -> Any:
        seen.append([piece.size for piece in pieces])
        return compute(self, pieces, settings)

    monkeypatch.setattr(type(pipe), "compute", watched)
    monkeypatch.setattr(type(pipe), "budget", {"cpu": 30, "cuda": 30})
    texts = ["a " * count for count in (3, 30, 1, 12, 9, 2, 8)]
    same(pipe(texts), [pipe(text) for text in texts])
    assert seen[:4] == [[32], [14, 11, 5], [10, 4, 3], [2]] or seen[:3] == [[32], [14, 11], [10, 5, 4, 3]]
    seen.clear()
    pipe(texts, batch_size=3)
    assert [len(sizes) for sizes in seen] == [3, 3, 1]


def test_a_batch_that_memory_does_not_hold_is_halved(monkeypatch):
    pipe, sizes = ours("text-classification"), []
    want, compute = pipe(TEXTS), type(pipe).compute

    def small(self: Any, pieces: Any, settings: Any) -> Any:
        sizes.append(len(pieces))
        if len(pieces) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, pieces, settings)

    monkeypatch.setattr(type(pipe), "compute", small)
    same(pipe(TEXTS), want)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "zero-shot-classification"])
def test_an_item_that_cannot_be_used_is_an_error_in_its_place(task):
    items, options = TASKS[task]
    pipe = ours(task)
    want = pipe(items, **options)
    with pytest.warns(UserWarning, match="item 1: "):
        got = pipe([items[0], 7, *items[1:], "x " * 100 + "[MASK]"], **options)
    bad = [got[1]] if task == "token-classification" else [got[1], got[-1]]
    if task == "text-generation":
        assert "the prompt has 206 tokens" in str(got[-1])
    assert all(isinstance(one, ItemError) for one in bad) and bad[0].index == 1
    same([got[0], *got[2 : 1 + len(items)]], want)
    for use in (lambda: bad[0]["label"], lambda: list(bad[0]), lambda: bad[0][0]):
        with pytest.raises(ItemError, match=r"item 1: .*not int"):
            use()
    with pytest.raises(RequestError, match="not int"):
        pipe(7, **options)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("text-classification", {"top_k": 0}),
        ("zero-shot-classification", {}),
        ("fill-mask", {"targets": []}),
        ("text-generation", {"temperature": -1.0}),
        ("text-generation", {"penalty_alpha": 0.5}),
    ],
    ids=str,
)
def test_options_that_no_item_can_be_used_with_raise_at_once(task, options):
    with pytest.raises(RequestError, match=next(iter(options), "candidate_labels")):
        ours(task)(TASKS[task][0], **options)


def test_generation_tells_how_far_it_is_before_its_window_ends():
    pipe, told = ours("text-generation"), []
    settings = pipe.parse(GREEDY, pipe.defaults)
    pieces = [pipe.prepare_one(text, settings)[0] for text in ("a", "bcd", "ef")]
    pipe.watched(pieces, settings, told.append)
    assert sum(told) == 3
    told.clear()
    drawn = pipe.parse({"do_sample": True, "num_return_sequences": 2}, settings)
    pipe.watched(pieces, drawn, told.append)
    assert sum(told) == pytest.approx(3)


def test_a_text_without_tokens_is_an_error_of_its_own():
    folder = llama("LlamaForSequenceClassification")
    pipe = taut.pipeline(model=folder, device="cpu")
    assert pipe.task == "text-classification"
    with pytest.warns(UserWarning, match="item 1: the text is empty, and the tokenizer adds no token"):
        got = pipe(["hello", "", "a"])
    reference = transformers.pipeline("text-classification", str(folder), device="cpu")
    same([got[0], got[2]], reference(["hello", "a"]))


def test_a_bar_shows_how_far_it_is(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what is captured is no terminal
    pipe = ours("text-classification")
    pipe(TEXTS, progress=True)
    assert "text-classification" in capfd.readouterr().err
    pipe(TEXTS)
    assert not capfd.readouterr().err


def test_what_pipeline_itself_refuses():
    for arguments, message in (
        ({}, "name a task, a model, or both"),
        ({"task": "summarization"}, "no default model for summarization"),
        ({"task": "fill-mask", "model": 3}, "model is a int; expected a folder"),
        ({"task": "fill-mask", "model": "x", "device": 0, "device_map": "auto"}, "give one of them"),
        ({"task": "fill-mask", "model": "x", "framework": "tf"}, "framework is 'tf'"),
        ({"model": ours("fill-mask").model, "dtype": "float32"}, "loaded already"),
    ):
        with pytest.raises(RequestError, match=message):
            taut.pipeline(**arguments)
    with pytest.raises(RequestError, match="window is 0"):
        taut.pipeline(model=ours("fill-mask").model, tokenizer=ours("fill-mask").tokenizer, window=0)
    assert repr(ours("fill-mask")) == "fill-mask pipeline of a BertForMaskedLM on cpu"
