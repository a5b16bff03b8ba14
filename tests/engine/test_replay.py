"""Forwards by CUDA graphs: what modules give without, for batches of any shape that a graph serves."""

from __future__ import annotations

import copy

import pytest
import torch

from taut import AutoModel, AutoModelForCausalLM
from taut.batch import Batch
from taut.engine import replay
from taut.engine.engine import Engine
from taut.engine.request import Request, SamplingParams
from tests.encoders import CASES as ENCODERS
from tests.families import CASES, VOCAB, checkpoint

FAMILIES = ["llama", "mistral-window", "gemma2", "opt", "bloom", "phi3-longrope", "llama-rope-dynamic"]


def load(name: str, dtype=torch.bfloat16):
    case = next(case for case in CASES if case.name == name)
    return AutoModelForCausalLM.from_pretrained(checkpoint(case), dtype=dtype, device="cuda")


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got.float() - want.float()).norm() <= 2e-2 * want.float().norm()


def test_sizes_waste_little():
    for sizes in (16, 32):
        for count in range(1, 5000):
            size = replay._up(count, 16, sizes)
            assert count <= size < count + max(16, count / sizes + 1)


def test_rooms_that_seem_to_hold_rows_of_one_length_do():
    full = [((context,) * count, context) for context in (48, 1024) for count in (1, 2, 72)]
    uneven = [((1024,) * 70 + (320,), 1024), ((48,) * 32 + (7,) * 7, 48), ((9, 3), 8), ((5,) * 7, 8)]
    for lengths, context in full + uneven:
        batch = Batch.of([[0] * length for length in lengths])
        key = replay._size_of(batch, context)
        if key is not None:
            tokens, rows = key[:2]
            assert tokens - batch.tokens <= context
            assert tokens != rows * min(tokens, context) or len(set(lengths)) == 1
        assert key is not None or (lengths, context) in uneven


def test_what_graphs_depend_on_is_seen():
    case = next(case for case in CASES if case.name == "llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint(case), device="cpu")
    replays = replay.Replays(model, model.decoder)
    seen = [replays._watch()]
    assert seen[0] is not None and replays._watch() == seen[0]
    layer = model.model.layers[1]
    for register in (layer.register_forward_hook, layer.mlp.register_forward_pre_hook):
        hook = register(lambda *_: None)
        assert replays._watch() is None
        hook.remove()
    layer.mlp.train()
    assert replays._watch() is None
    layer.eval()
    assert replays._watch() == seen[0]
    layer.self_attn.only = ("eager",)
    seen.append(replays._watch())
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data.clone()
    seen.append(replays._watch())
    layer.mlp = copy.deepcopy(layer.mlp)
    seen.append(replays._watch())
    model.reverse_bettertransformer()
    seen.append(replays._watch())
    layer.mlp.down_proj.register_buffer("table", torch.ones(2))
    seen.append(replays._watch())
    assert None not in seen and len(set(seen)) == len(seen)


@torch.no_grad()
def test_a_batch_is_worth_the_same_in_the_room_of_its_size():
    """What a graph computes, on the CPU: rows that fill the batch up change nothing for the others."""
    for name in ("bert", "electra"):
        case = next(case for case in ENCODERS if case.name == name)
        model = AutoModel.from_pretrained(checkpoint(case, "AutoModel"), device="cpu")
        rooms = {}
        for lengths in ((9, 1, 23), (10, 2, 20), (16, 16), (40, 0, 8), (3,) * 11, (1, 32), (2,) * 16):
            batch = Batch.of(prompts(*lengths), "cpu")
            key = replay._size_of(batch, model.config.context)
            room = rooms.setdefault(key, replay._room(batch, key, model.config.context))
            replay._fill(room, batch)
            assert room.starts[-1] == room.tokens and room.rows < batch.rows + 8
            got, want = model.model(room)[: batch.tokens], model.model(batch)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert len(rooms) < 7  # some are used again, after other batches


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_graph_gives_what_the_modules_give(name):
    model = load(name)
    replays = replay.Replays(model, model.decoder)
    for lengths in ((30,), (9, 1, 23), (30,), (7,), (9, 1, 23), (10, 2, 20), (32,), (40, 0, 8), (40, 0, 8)):
        batch = Batch.of(prompts(*lengths), "cuda")
        close(replays(batch), model.decoder(batch))
    assert len(replays._graphs) >= 2
    held = len(replays._graphs)
    watched = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: watched.append(True))
    replays(batch)
    hook.remove()
    assert watched and len(replays._graphs) == held
    twin = copy.deepcopy(model)
    for param in model.parameters():
        param.mul_(0.5)
    close(replays(batch), model.decoder(batch))  # the same memory, other values
    model.to("cpu").to("cuda")
    for _ in range(3):
        close(replays(batch), model.decoder(batch))
    close(
        twin(torch.tensor(prompts(20), device="cuda")).logits,
        twin.float()(torch.tensor(prompts(20), device="cuda")).logits,
    )


@pytest.mark.gpu
def test_what_comes_of_a_graph_is_an_ordinary_tensor():
    model = load("llama")
    ids = torch.tensor(prompts(24), device="cuda")
    with torch.no_grad():
        outs = [model(ids).logits for _ in range(3)]
    assert not outs[-1].is_inference() and torch.equal(outs[1], outs[2])
    assert sum(len(replays._graphs) for replays in model._replays.values()) == 1
    model(ids, labels=ids).loss.backward()  # and training is unchanged


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_prefills_by_graphs_give_the_same_tokens(name):
    model = load(name, torch.float16)
    want = None
    for graphs in (False, True, True):
        engine = Engine(model, cache_tokens=1024, chunk=16)
        if not graphs:
            engine.runner.replays = model.decoder
        outputs = []
        for _ in range(3):  # the second round captures, the third replays
            made = [Request(p, SamplingParams(max_new_tokens=6)) for p in prompts(20, 3, 25)]
            engine.run(made)
            outputs.append([request.output for request in made])
        assert outputs[0] == outputs[1] == outputs[2]
        assert not graphs or engine.runner.replays._graphs
        want = want or outputs[0]
        assert outputs[0] == want
