"""Decode graphs: the tokens of steps without a graph, and no step that waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from taut import AutoModelForCausalLM, AutoModelForSeq2SeqLM, attention_kernel
from taut.engine import graph
from taut.engine.draft_model import Assistant, DraftModel
from taut.engine.engine import Engine
from taut.engine.graph import DecodeGraph
from taut.engine.lookup import Lookup
from taut.engine.request import Request, SamplingParams
from taut.engine.runner import Runner
from tests import seq2seq
from tests.engine.checks import check_pages
from tests.engine.guesses import Always
from tests.families import CASES, VOCAB, checkpoint

gpu = pytest.mark.gpu

FAMILIES = ["llama", "mistral-window", "qwen3", "gemma2", "phi3-longrope", "llama-rope-dynamic"]
FAMILIES += ["mixtral", "qwen2-moe-some-layers", "qwen3-moe", "gpt-oss"]
PARAMS = [
    {},
    {"greedy": False, "seed": 5},
    {"greedy": False, "seed": -3, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"greedy": False, "seed": 9, "temperature": 1.3, "min_p": 0.05},
]


def load(name: str, dtype=torch.float32, device="cuda"):
    case = next(case for case in CASES if case.name == name)
    return AutoModelForCausalLM.from_pretrained(checkpoint(case), dtype=dtype, device=device)


def requests(eos: tuple[int, ...] = ()) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate((3, 17, 1, 9, 12)):
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        options = PARAMS[index % len(PARAMS)]
        params = SamplingParams(max_new_tokens=(14, 9, 15, 1, 20)[index], eos_token_ids=eos, **options)
        made.append(Request(prompt, params))
    return made


def outputs(engine: Engine, asked: list[Request]) -> list[tuple[list[int], str | None]]:
    engine.run(asked)
    return [(request.output, request.finish_reason) for request in asked]


@gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_steps_without_a_graph(name):
    model = load(name)
    eager = Engine(model, cache_tokens=512)
    eager.graphs = None
    want = outputs(eager, requests())
    ends = tuple({tokens[len(tokens) // 2] for tokens, _ in want})  # some rows end early, by surprise
    for eos in ((), ends):
        for options in ({}, {"max_rows": 2}, {"page_size": 4}):
            again = Engine(model, cache_tokens=512, **options)
            again.graphs = None
            graphs = Engine(model, cache_tokens=512, **options)
            assert graphs.graphs is not None
            assert outputs(graphs, requests(eos)) == outputs(again, requests(eos))
            assert graphs.pages.free == graphs.pages.count
            assert graphs.graphs._graphs


@gpu
@pytest.mark.parametrize("name", ["t5", "bart", "marian-two-tables"])
def test_tokens_of_encoder_decoders_are_those_of_steps_without_a_graph(name):
    case = next(case for case in seq2seq.CASES if case.name == name)
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint(case, "AutoModelForSeq2SeqLM"), device="cuda")

    def asked() -> list[Request]:
        made = requests()
        for request, length in zip(made, (30, 3, 17, 1, 40), strict=True):
            request.prompt, request.source = [4], tuple(3 + n % 90 for n in range(length))
        return made

    for options in ({}, {"max_rows": 2}, {"page_size": 4}):
        eager, graphs = (Engine(model, cache_tokens=512, **options) for _ in range(2))
        eager.graphs = None
        assert outputs(graphs, asked()) == outputs(eager, asked())
        assert graphs.pages.free == graphs.pages.count and graphs.graphs._graphs


@gpu
def test_a_replay_equals_the_same_step_without_one_bit_for_bit():
    model = load("llama", torch.bfloat16)
    engine = Engine(model, cache_tokens=256)
    asked = requests()[:3]
    for request in asked:
        engine.submit(request)
    graphs = engine.graphs._graphs
    while not any(graph.rows >= len(asked) for graph in graphs.values()):
        engine.step()
    with torch.inference_mode():
        if engine._under_way is not None:
            engine._receive(engine._under_way)
            engine._under_way = None
        work = engine.scheduler.schedule()
        graph = next(graph for graph in graphs.values() if graph.rows >= len(work))
        graph.fill(work)
        before = [cache.clone() for cache in engine.runner.keys]
        graph.replay()
        got = graph.tokens.clone(), [cache.clone() for cache in engine.runner.keys]
        for cache, old in zip(engine.runner.keys, before, strict=True):
            cache.copy_(old)
        graph.fill(work)
        graph._step()
        assert torch.equal(got[0], graph.tokens)
        for replayed, eager in zip(got[1], engine.runner.keys, strict=True):
            assert torch.equal(replayed, eager)


@gpu
@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gpt-oss"])
def test_steady_decode_does_not_synchronise(name):
    engine = Engine(load(name, torch.bfloat16), cache_tokens=512)
    request = engine.submit(Request([5, 6, 7], SamplingParams(max_new_tokens=40)))
    while len(request.output) < 4:
        engine.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # reading a token waits for an event, which is no synchronisation
    try:
        for _ in range(20):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(request.output) == 24


@gpu
def test_nan_ends_the_request_by_name():
    model = load("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    engine = Engine(model, cache_tokens=256)
    request = engine.submit(Request([5], SamplingParams(max_new_tokens=4)))
    while engine.has_work:
        engine.step()
    assert request.finish_reason == "error" and "model.layers.1.mlp" in str(request.error)


@gpu
@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "llama-rope-dynamic"])
def test_guesses_beside_graphs_change_no_token(name):
    """Drafts chain on the device; the steps that check them are no graphs, those between them are."""
    model = load(name)
    want = outputs(Engine(model, cache_tokens=512), requests())
    drafts = DraftModel(model, num_pages=64)
    for drafter in (Assistant(drafts, model, 6), Lookup(6)):
        engine = Engine(model, cache_tokens=512)
        engine.ledger = Always()
        asked = requests()
        for request in asked:
            request.drafter = drafter
        assert outputs(engine, asked) == want
        assert engine.pages.free == engine.pages.count and drafts.pages.free == drafts.pages.count
    assert drafts.graphs is not None and drafts.graphs._graphs
    many = [Request([5, 6, 7, 5, 6, 7, 5, 6], SamplingParams(20)) for _ in range(2)]
    engine = Engine(model, cache_tokens=512)
    many[1].drafter = Lookup(6)  # with the ledger that measures
    engine.run(many)
    assert many[0].output == many[1].output


class Late(TorchFunctionMode):
    """A device that does what it was told as late as it may: copies that don't block, and what else follows
    them, wait until the host waits for an event that was recorded behind them."""

    def __init__(self):
        super().__init__()
        self.told: list[Callable[[], object]] = []
        self.done = self.count = 0
        self.busy = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        late = func is torch.Tensor.mul_ or (func is torch.Tensor.copy_ and kwargs.get("non_blocking"))
        if not late or self.busy:
            return func(*args, **kwargs)
        self.tell(lambda: func(*args, **kwargs))
        return args[0]

    def tell(self, work: Callable[[], object]) -> None:
        self.told.append(work)
        self.count += 1

    def until(self, count: int) -> None:
        """Do the first `count` things that it was told."""
        with self.at_once():
            while self.done < count:
                self.told.pop(0)()
                self.done += 1

    @contextmanager
    def at_once(self):
        """What runs inside isn't put off."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    def capture(self, step, device, pool):
        with self.at_once():
            step()
        return lambda: self.tell(step)

    def event(self) -> SimpleNamespace:
        """Of the work that was told before it was last recorded."""
        last = [0]
        return SimpleNamespace(
            record=lambda: last.__setitem__(0, self.count), synchronize=lambda: self.until(last[0])
        )


@contextmanager
def steps():
    """Graphs whose steps are run in place of being replayed, late: what they do on a GPU, but for the
    capture. Attention runs on the reference, the only kind on a CPU that doesn't take a bound of lengths for
    one."""
    device, run = Late(), Runner.__call__

    def after(runner, work, **options):
        if work:
            device.until(device.count)
        with device.at_once():
            return run(runner, work, **options)

    with pytest.MonkeyPatch.context() as patch, attention_kernel("eager"), device:
        patch.setattr(graph, "_capture", device.capture)
        patch.setattr(graph, "refuses", lambda model: None)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.cuda, "Event", device.event)
        patch.setattr(Runner, "__call__", after)
        yield patch


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}, {"page_size": 4, "chunk": 8}], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "mistral-window"])
def test_steps_of_a_graph_give_the_tokens_of_steps_without(name, options):
    """Rows end while others go on in the same graph, and others begin beside them."""
    model = load(name, device="cpu")
    kept, beside = [], []
    keep, start = graph._Graph.keep, DecodeGraph.start
    with steps() as patch:
        eager, graphs = (Engine(model, cache_tokens=512, **options) for _ in range(2))
        graphs.graphs = DecodeGraph(graphs.runner)

        def started(self, work):
            beside.append(len(work) < len(graphs.scheduler.running))
            return start(self, work)

        patch.setattr(graph._Graph, "keep", lambda g, places: (kept.append(places), keep(g, places))[1])
        patch.setattr(DecodeGraph, "start", started)
        want = outputs(eager, requests())
        ends = tuple({tokens[len(tokens) // 2] for tokens, _ in want})
        for eos in ((), ends):
            assert outputs(graphs, requests(eos)) == outputs(eager, requests(eos))
            assert graphs.pages.free == graphs.pages.count
    assert kept and any(beside)


@cache
def tiny():
    return load("llama", torch.float64, "cpu")  # rounding must not decide what is drawn


@pytest.mark.parametrize("size", [2, 16])
def test_a_row_gets_its_last_token_though_the_host_is_already_done_with_it(size):
    """The host takes rows out of a graph before the device has begun the step that gives their last token."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (2 + i % 4,), generator=generator).tolist() for i in range(16)]
    lengths = [(2, 3, 4, 9)[i % 4] for i in range(16)]
    with steps():
        e = Engine(tiny(), page_size=size, cache_tokens=512)
        e.graphs = DecodeGraph(e.runner)
        asked = [Request(p, SamplingParams(n)) for p, n in zip(prompts, lengths, strict=True)]
        e.run(asked)
    for prompt, length, request in zip(prompts, lengths, asked, strict=True):
        assert request.output == alone(tuple(prompt), 0)[:length]


@cache
def alone(prompt: tuple[int, ...], option: int) -> list[int]:
    params = SamplingParams(max_new_tokens=14, **PARAMS[option])
    with attention_kernel("eager"):
        (done,) = Engine(tiny(), cache_tokens=64).run([Request(list(prompt), params)])
    return done.output


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_that_come_and_go_beside_graphs_get_the_tokens_they_get_alone(data):
    with steps():
        size = data.draw(st.integers(1, 5), "page size")
        e = Engine(
            tiny(),
            page_size=size,
            cache_tokens=data.draw(st.sampled_from([32, 48, 80]), "cache tokens"),
            chunk=data.draw(st.sampled_from([2, 7, 64]), "chunk"),
            max_rows=data.draw(st.sampled_from([2, 5, 9]), "rows"),
        )
        e.graphs = DecodeGraph(e.runner)
        rows: list[tuple[Request, int]] = []
        for action in data.draw(st.lists(st.sampled_from("ssssstttttc"), min_size=8, max_size=40), "actions"):
            if action == "s":
                stem = data.draw(st.sampled_from([(), (7, 8, 9, 7, 8, 9, 11)]))
                prompt = stem + tuple(data.draw(st.lists(st.integers(3, 30), min_size=1, max_size=5)))
                option = data.draw(st.integers(0, len(PARAMS) - 1))
                params = SamplingParams(data.draw(st.integers(1, 14)), **PARAMS[option])
                rows.append((e.submit(Request(list(prompt), params)), option))
            elif action == "t":
                e.step()
            elif rows:
                e.cancel(data.draw(st.sampled_from(rows))[0])
            check_pages(e.scheduler)
        while e.has_work:
            e.step()
            check_pages(e.scheduler)
        assert e.pages.free == e.pages.count
        for request, option in rows:
            made, new = request.output, request.params.max_new_tokens
            assert made == alone(tuple(request.prompt), option)[: len(made)]
            assert request.finish_reason == "cancelled" or len(made) == new
