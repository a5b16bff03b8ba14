"""`past_key_values`: rows that forward and generate hand back and go on from, as in transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from taut import DynamicCache
from taut.errors import RequestError
from taut.modeling import CausalLM
from tests.engine.test_engine_families import CONFIGS, build
from tests.engine.test_generate import PAD, VOCAB, padded
from tests.engine.test_generate import pair as pair  # a fixture


def same(cached: torch.Tensor, whole: torch.Tensor) -> None:
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cached_forward_equals_the_whole_one(name):
    """A prompt in two pieces, then token by token, past a page; and with another row beside it."""
    model = build(name, torch.float64)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 30), generator=draw)
    if name == "longrope":
        ids = ids[:, :16]  # beyond, all keys change
    whole = model(ids).logits
    for rows in (ids[:1], ids):
        past, at, seen = None, 0, []
        for width in (5, 7, *[1] * (ids.shape[1] - 12)):
            out = model(rows[:, at : at + width], past_key_values=past, use_cache=True)
            past, at = out.past_key_values, at + width
            seen.append(out.logits)
            assert past.get_seq_length() == len(past) == at
        torch.testing.assert_close(torch.cat(seen, 1), whole[: len(rows)], rtol=1e-9, atol=1e-9)
        assert past.tokens == rows.tolist() and not out.logits.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_those_of_transformers(pair, side):
    theirs, model = pair
    ids, mask = padded()
    if side == "right":
        ids, mask = (
            torch.stack([row.roll(int(m.sum()) - 7) for row, m in zip(t, mask, strict=True)])
            for t in (ids, mask)
        )
    ours, other = DynamicCache(), transformers.DynamicCache(config=theirs.config)
    for step in range(6):
        given = ids[:, -7:] if step == 0 else ids[:, -1:]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
        with torch.no_grad():
            expected = theirs(
                given, attention_mask=mask, position_ids=positions, past_key_values=other
            ).logits
        kept = {"position_ids": positions} if step else {}
        mine = model(given, attention_mask=mask, past_key_values=ours, **kept).logits
        real = mask[:, -given.shape[1] :] == 1
        torch.testing.assert_close(mine[real], expected[real], rtol=1e-4, atol=1e-4)
        last = mine[torch.arange(3), real.long().cumsum(1).argmax(1)].argmax(-1, keepdim=True)
        ids, mask = torch.cat((ids, last), 1), torch.cat((mask, torch.ones_like(last)), 1)
    with_new_columns = model(ids[:, -1:], attention_mask=torch.ones(3, 1), past_key_values=ours).logits
    assert with_new_columns.shape == (3, 1, VOCAB)


def test_rows_can_be_cut_copied_and_chosen(pair):
    _, model = pair
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    past = model(ids, use_cache=True).past_key_values
    kept = copy.deepcopy(past)
    past.crop(17)
    same(model(ids[:, 17:], past_key_values=past).logits, model(ids).logits[:, 17:])
    past.crop(-2)
    assert past.get_seq_length() == 18 and past.tokens == ids[:, :18].tolist()
    past.crop(99)
    assert past.get_seq_length() == 18
    turned = copy.deepcopy(kept)
    turned.reorder_cache(torch.tensor([1, 1, 0]))
    rows = torch.cat((ids[[1, 1, 0]], torch.tensor([[4], [5], [6]])), 1)
    same(model(rows[:, 20:], past_key_values=turned).logits, model(rows).logits[:, 20:])
    kept.batch_repeat_interleave(2)
    assert kept.tokens == [row for row in ids.tolist() for _ in range(2)]
    rows = torch.cat((ids.repeat_interleave(2, 0), torch.tensor([[4], [5], [6], [7]])), 1)
    same(model(rows[:, 20:], past_key_values=kept).logits, model(rows).logits[:, 20:])


def test_a_plain_call_is_gone_on_from_too(pair):
    """As programs do that know the cache to be on by default."""
    _, model = pair
    ids, mask = padded()
    out = model(ids, attention_mask=mask)
    assert list(out) == ["logits"] and "past_key_values" not in out
    past = out.past_key_values
    assert past is out["past_key_values"] is out.get("past_key_values")
    assert past.tokens == [row[m == 1].tolist() for row, m in zip(ids, mask, strict=True)] and not past.keys
    new = torch.tensor([[5], [6], [7]])
    longer = model(torch.cat((ids, new), 1), attention_mask=torch.cat((mask, torch.ones(3, 1)), 1))
    same(model(new, past_key_values=past).logits, longer.logits[:, 7:])
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids[:1]).past_key_values.tokens == [ids[0].tolist()]


def test_modes_may_change_from_call_to_call(pair):
    _, model = pair
    ids = torch.randint(3, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    past = DynamicCache()
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad) * 2
    for at, mode in enumerate(modes):
        with mode():
            out = model(ids[:, 5 * at : 5 * at + 5], past_key_values=past).logits
    same(out, model(ids).logits[:, 25:30])


def test_embeddings_are_gone_on_from_too(pair):
    _, model = pair
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    past = model(inputs_embeds=model.model.embed_tokens(ids[:, :6]), use_cache=True).past_key_values
    same(model(ids[:, 6:], past_key_values=past).logits, model(ids).logits[:, 6:])
    with pytest.raises(RequestError, match="past_key_values holds embeddings"):
        model.generate(ids, past_key_values=past, max_new_tokens=2)


def test_generate_and_forward_go_on_from_one_another(pair):
    _, model = pair
    ids, mask = padded()
    options = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **options)
    past = first.past_key_values
    assert past.get_seq_length() == 12 and past.lengths == [12, 9, 10]
    longer = model.generate(ids, attention_mask=mask, **{**options, "max_new_tokens": 7})
    step = model(first.sequences[:, -1:], past_key_values=copy.deepcopy(past)).logits[:, -1]
    assert step.argmax(-1).tolist() == longer.sequences[:, -1].tolist()
    longer_mask = torch.cat((mask, torch.ones(3, 6, dtype=mask.dtype)), 1)
    again = model.generate(first.sequences, attention_mask=longer_mask, past_key_values=past, **options)
    assert again.past_key_values is past and past.get_seq_length() == 18
    plain = model.generate(ids, attention_mask=mask, **{**options, "max_new_tokens": 12})
    assert again.sequences.tolist() == plain.sequences.tolist()
    beams = model.generate(ids, attention_mask=mask, num_beams=2, num_return_sequences=2, **options)
    assert len(beams.past_key_values.lengths) == 6
    none = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert none.past_key_values is None and none.sequences.tolist() == first.sequences.tolist()


def test_a_conversation_computes_each_token_once(pair):
    """As people write it: one cache for all turns."""
    _, model = pair
    model = copy.deepcopy(model)
    seen = []
    model.model.layers[0].register_forward_hook(lambda _m, given, _out: seen.append(given[0].shape[0]))
    past, ids = DynamicCache(), [5, 6, 7, 8]
    for turn in range(4):
        ids = model.generate([ids], past_key_values=past, max_new_tokens=8, eos_token_id=None)[0].tolist()
        assert past.tokens == [ids[:-1]]
        ids += [9 + turn, 8]
    assert sum(seen) < 4 + 4 * 10 + 3 * 16  # of the last page of 16 tokens, keys are computed again


def test_bad_pasts_are_named(pair):
    _, model = pair
    ids = torch.full((2, 5), 7)
    past = model(ids, use_cache=True).past_key_values
    for match, options in (
        (r"past_key_values is a tuple; expected", {"past_key_values": ((ids, ids),)}),
        (r"past_key_values has 2 rows, and the call 1", {"input_ids": ids[:1]}),
        (r"past_key_values is given and use_cache is False", {"use_cache": False}),
        (r"a loss has gradients and the cache keeps none", {"labels": ids}),
        (r"attention_mask has shape \[2, 3\]; expected 10 columns", {"attention_mask": torch.ones(2, 3)}),
        (r"position_ids are not those", {"position_ids": torch.arange(5)[None]}),
        (r"a row has 69 tokens, and the model's context is 64", {"input_ids": torch.full((2, 64), 7)}),
    ):
        with pytest.raises(RequestError, match=match):
            model(**{"input_ids": ids, "past_key_values": copy.deepcopy(past), **options})
    for match, options in (
        (r"past_key_values is a tuple; expected", {"past_key_values": ((ids, ids),)}),
        (
            r"row 1 of input_ids does not go on .* differ at token 3 of 5",
            {"inputs": [[7] * 6, [7, 7, 7, 8, 8]]},
        ),
        (r"row 0 of input_ids does not go on .* differ at token 2 of 5", {"inputs": [[7] * 2, [7] * 2]}),
        (r"past_key_values has 2 rows, and input_ids 1", {"inputs": [[7] * 6]}),
        (r"past_key_values is given and use_cache is False", {"use_cache": False}),
    ):
        with pytest.raises(RequestError, match=match):
            model.generate(**{"inputs": ids, "past_key_values": past, "max_new_tokens": 2, **options})
    again = [[7] * 4 + [8] * 4, [7] * 5]
    past.crop(4)
    with pytest.raises(RequestError, match="row 1 of input_ids does not go on"):
        model.generate([again[0], [8] * 8], past_key_values=copy.deepcopy(past), max_new_tokens=2)
    past = DynamicCache.of([[7] * 6], 6)
    with pytest.warns(UserWarning, match="row 0 of input_ids leaves past_key_values at token 4 of 6"):
        left = model.generate(again[:1], past_key_values=past, max_new_tokens=2)
    assert left.tolist() == model.generate(again[:1], max_new_tokens=2).tolist()
    longrope = build("longrope", torch.float64)
    past = longrope(torch.full((1, 15), 7), use_cache=True).past_key_values
    with pytest.raises(RequestError, match="a row passes 16 tokens"):
        longrope(torch.full((1, 2), 7), past_key_values=past)


def test_a_failed_forward_leaves_the_rows_as_they_were(pair):
    _, model = pair
    model: CausalLM = copy.deepcopy(model)
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    past = model(ids[:, :6], use_cache=True).past_key_values

    def fails(*_):
        raise MemoryError

    handle = model.model.layers[1].register_forward_hook(fails)
    with pytest.raises(MemoryError):
        model(ids[:, 6:], past_key_values=past)
    handle.remove()
    same(model(ids[:, 6:], past_key_values=past).logits, model(ids).logits[:, 6:])
    assert PAD not in past.tokens[0]


@pytest.mark.gpu
def test_on_a_gpu_too(pair):
    model = copy.deepcopy(pair[1]).cuda()
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1)).cuda()
    past = model(ids[:, :13], use_cache=True).past_key_values
    out = torch.cat([model(ids[:, at : at + 1], past_key_values=past).logits for at in range(13, 20)], 1)
    torch.testing.assert_close(out, model(ids).logits[:, 13:], rtol=1e-4, atol=1e-4)
