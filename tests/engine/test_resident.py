"""The engine that stays with its model: what it survives, and that no call sees another's."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from taut.bench.subjects import quantized
from taut.engine import resident
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.errors import RequestError
from taut.modeling import CausalLM
from taut.quant.config import named

CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PROMPT = list(range(3, 50))
OPTIONS = {"max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM.from_config(CONFIG, dtype=torch.float32).init_weights(std=0.3)


def engine(model):
    return Resident.of(model)._engine


def tokens(model, prompt=PROMPT, **options) -> list[int]:
    return model.generate([prompt], **{**OPTIONS, **options})[0, len(prompt) :].tolist()


def fresh(model, prompt=PROMPT) -> list[int]:
    return tokens(copy.deepcopy(model), prompt)


def test_calls_share_an_engine_and_what_it_has_cached(model):
    expected = fresh(model)
    assert engine(model) is None
    assert tokens(model) == expected
    kept = engine(model)
    seen = []
    model.model.layers[0].register_forward_hook(lambda _m, given, _out: seen.append(given[0].shape[0]))
    tokens(model)  # the hook is part of the model: a new engine
    assert engine(model) is not kept and sum(seen) == len(PROMPT) + 7
    seen.clear()
    assert tokens(model) == list(model.stream([PROMPT], **OPTIONS)) == expected
    assert sum(seen) == 2 * (len(PROMPT) - 32 + 7)  # two pages of 16 are known
    assert tokens(model, [3, 4]) == fresh(model, [3, 4])


def test_the_engine_grows_and_never_shrinks(model):
    tokens(model, [3, 4])
    small = engine(model)
    tokens(model, PROMPT)
    large = engine(model)
    assert large is not small and large.pages.count > small.pages.count
    tokens(model, [3, 4])
    assert engine(model) is large
    model.free_cache()
    assert engine(model) is None
    tokens(model, [3, 4])
    assert engine(model).pages.count == small.pages.count


def written(model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)


def swapped(model):
    model.model.layers[0].mlp.down_proj.weight.data = -model.model.layers[0].mlp.down_proj.weight.data


def replaced(model):
    old = model.model.layers[0].mlp.down_proj.weight
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(-old.detach())


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _given, out: -out)


def module(model):
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)


def narrowed(model):
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [written, swapped, replaced, hooked, module, narrowed])
def test_a_model_that_changed_gives_what_it_gives_now(model, change):
    before = tokens(model)
    kept = engine(model)
    change(model)
    expected = fresh(model)
    assert expected != before or change is narrowed
    assert tokens(model) == expected
    assert (engine(model) is kept) == (change is written)


def test_copies_and_files_leave_the_engine_behind(model):
    tokens(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert engine(other) is None and tokens(other) == tokens(model)


def test_the_engine_does_not_keep_its_model_alive(model):
    tokens(model)
    stream = model.stream([PROMPT], **OPTIONS)
    first = next(stream)
    there = weakref.ref(model)
    gc.disable()
    try:
        model = copy.deepcopy(model)  # the fixture still holds the first one
        tokens(model)
        there = weakref.ref(model)
        del model
        assert there() is None
    finally:
        gc.enable()
    del there
    assert [first, *stream] == list(stream.tokens)


def test_a_stream_keeps_its_model(model):
    expected = tokens(model)
    stream = copy.deepcopy(model).stream([PROMPT], **OPTIONS)
    gc.collect()
    assert list(stream) == expected


def test_threads_share_the_engine(model):
    prompts = [PROMPT[: 3 + 5 * at] for at in range(6)]
    expected = [fresh(model, prompt) for prompt in prompts]
    got: dict[int, list[int]] = {}

    def work(at: int) -> None:
        got[at] = tokens(model, prompts[at])

    threads = [threading.Thread(target=work, args=(at,)) for at in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[at] for at in range(6)] == expected
    assert engine(model).pages.free == engine(model).pages.count


def test_a_hook_may_generate_and_may_not_step(model):
    inner = []

    def nested(ids, scores):
        inner.append(tokens(model, [3, 4]))
        return scores

    assert tokens(model, logits_processor=[nested]) == fresh(model)
    assert inner == [fresh(model, [3, 4])] * 8
    kept = engine(model)

    def steps(ids, scores):
        kept.step()
        return scores

    with pytest.raises(RequestError, match="a request's hook steps the engine that called it"):
        tokens(model, logits_processor=[steps])
    assert kept.pages.free == kept.pages.count


def test_what_is_left_by_an_interrupted_call_does_not_stay(model):
    def interrupt(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokens(model, logits_processor=[interrupt])
    assert not engine(model).has_work and engine(model).pages.free == engine(model).pages.count
    assert tokens(model) == fresh(model)


@pytest.mark.gpu
def test_a_gpu_keeps_its_graphs_from_call_to_call(model):
    there = copy.deepcopy(model).cuda()
    assert tokens(there) == tokens(model)
    graphs = dict(engine(there).graphs._graphs)
    assert graphs
    written(model), written(there)
    assert tokens(there) == tokens(model)  # graphs read the weights where they lie
    assert engine(there).graphs._graphs == graphs
    held = torch.cuda.memory_allocated()
    there.free_cache()
    assert torch.cuda.memory_allocated() < held


def test_a_cache_leaves_room_for_what_products_unpack(model, monkeypatch):
    gpu, unpacking = torch.device("cuda"), resident._unpacking
    assert unpacking(model, gpu) == 0
    model = quantized(model, named("int8"))
    page, mlp = 2 * 2 * 2 * 8 * 4 * 16, 2 * 48 * 32  # the largest matrix: gate and up
    assert unpacking(model, gpu) == 3 * mlp * 4 and unpacking(model, model.device) == 0
    free = 3 * mlp * 4 + 5.5 * page / resident.CACHE_SHARE
    monkeypatch.setattr(resident, "_memory", lambda device: free)
    monkeypatch.setattr(resident, "_unpacking", lambda model, device: unpacking(model, gpu))
    requests = [Request([3] * 20, SamplingParams(max_new_tokens=30))] * 4
    assert resident._pages(model, requests, None) == 5


def test_requests_of_one_call_fit_together(model):
    rows = [Request([3] * 20, SamplingParams(max_new_tokens=30)) for _ in range(5)]
    assert Resident.of(model).engine(model, rows).pages.tokens >= 5 * 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 257}, r"257 rows .* at most 256"),
        (
            {"num_beams": 200, "max_new_tokens": 60},
            r"row 0 needs a cache of .* tokens .* rows 200\), but cpu has",
        ),
        ({"max_new_tokens": 81}, r"row 0 needs a cache of 128 tokens .* but cpu has room for 112"),
    ],
)
def test_more_than_memory_holds_is_refused_before_a_cache_is_made(model, monkeypatch, options, message):
    page = 2 * 2 * 2 * 8 * 4 * 16  # keys and values, layers, heads, head dim, bytes, tokens
    monkeypatch.setattr(resident, "_memory", lambda device: int(7 * page / resident.CACHE_SHARE) + page // 2)
    with pytest.raises(RequestError, match=message):
        tokens(model, **options)
    assert engine(model) is None
    expected = [fresh(model, prompt) for prompt in (PROMPT, PROMPT[1:])]  # one at a time has room
    rows = model.generate([PROMPT, PROMPT[1:]], **OPTIONS, pad_token_id=0)
    assert [row[-8:] for row in rows.tolist()] == expected
    assert engine(model).pages.count == 7
