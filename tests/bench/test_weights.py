"""The peers compute with Taut's own weights, in every family, and give the same scores."""

from __future__ import annotations

import pytest
import torch
import transformers

from taut import weights
from taut.bench.cases import Case, Inputs
from taut.bench.measure import DoesNotFit
from taut.bench.peers import make_peers
from taut.bench.run import agreement
from taut.bench.subjects import Taut, packed_weights, quantized, shared_weights
from taut.engine.engine import Engine
from taut.modeling import CausalLM
from taut.models import module_rules
from taut.quant.config import named
from tests.families import CASES, VOCAB, checkpoint
from tests.families import Case as Family

CPU = torch.device("cpu")
ONE_EACH = list({case.family: case for case in CASES}.values())


def peers_of(model: CausalLM, *wanted: str) -> list:
    found, notes = make_peers(
        wanted,
        model.config.source,
        shared_weights(model),
        auto="AutoModelForCausalLM",
        dtype=model.dtype,
        device=CPU,
    )
    assert len(found) + len(notes) == len(wanted)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_weights_are_what_a_save_writes(case: Family) -> None:
    model = CausalLM.from_pretrained(checkpoint(case))
    state = shared_weights(model)
    written = {tensor.name: tensor.read() for tensor in weights.store(model, module_rules(model.config))}
    assert state.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_a_peer_gives_the_same_scores(case: Family) -> None:
    model = CausalLM.from_pretrained(checkpoint(case))
    subjects = [Taut(model), *peers_of(model, "eager", "sdpa")]
    differences = agreement(subjects, model.config.vocab_size, CPU)
    with_sdpa = subjects[1].model._supports_sdpa
    assert list(differences) == ["transformers eager", "transformers sdpa"][: 2 if with_sdpa else 1]
    assert max(differences.values()) < 1e-4
    padded = Inputs.of(Case("generate", 3, 9, 4), model.config.vocab_size, CPU)
    with torch.inference_mode():
        own, *others = (subject.generate(padded, 4) for subject in subjects)
    assert all(torch.equal(own, other) for other in others)


def test_a_peer_takes_no_memory_of_its_own() -> None:
    model = CausalLM.from_pretrained(checkpoint(CASES[0]))
    (peer,) = peers_of(model, "sdpa")
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    assert {param.untyped_storage().data_ptr() for param in peer.model.parameters()} <= own
    assert peer.weights_bytes >= model.get_memory_footprint() - 4096  # Taut may hold tables of its own


def test_weights_in_few_bits_are_unpacked_for_a_peer() -> None:
    model = CausalLM.from_pretrained(checkpoint(CASES[0]), load_in_8bit=True, dtype=torch.float32)
    own = Taut(model)
    assert own.packed
    (difference,) = agreement([own, *peers_of(model, "sdpa")], model.config.vocab_size, CPU).values()
    assert 0 < difference < 0.1  # Taut rounds activations too


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bloom", "mixtral", "gpt-oss"])
def test_a_peer_computes_with_taut_s_own_codes(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    case = next(case for case in CASES if case.name == name)
    dense = CausalLM.from_pretrained(checkpoint(case), dtype=torch.float32)
    small = quantized(dense, named("int8"))
    loaded = CausalLM.from_pretrained(checkpoint(case), dtype=torch.float32, load_in_8bit=True)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(small(ids).logits, loaded(ids).logits)
    assert small.model.embed_tokens.weight is dense.model.embed_tokens.weight
    packed = packed_weights(small)
    options = {"auto": "AutoModelForCausalLM", "dtype": torch.float32, "device": CPU, "form": "int8"}
    state = shared_weights(small, without=packed)
    (peer,), _ = make_peers(["eager"], dense.config.source, state, packed=packed, **options)
    assert peer.name == "transformers eager int8"
    codes = {matrix.values.data_ptr() for matrix in packed.values()}
    assert codes and codes <= {param.data_ptr() for param in peer.model.parameters()}
    (difference,) = agreement([Taut(small), peer], VOCAB, CPU).values()
    assert difference < 0.1


def test_a_model_without_a_head_takes_the_names_of_one_with() -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    torch.manual_seed(0)
    bert = transformers.BertModel(config).eval()
    state = {f"bert.{name}": param.data for name, param in bert.named_parameters()}
    (peer,), _ = make_peers(
        ["sdpa"], config.to_dict(), state, auto="AutoModel", dtype=torch.float32, device=CPU
    )
    assert not peer.generates
    inputs = Inputs.of(Case("padded", 3, 9), 50, CPU)
    with torch.inference_mode():
        expected = bert(inputs.ids, attention_mask=inputs.mask)[0]
        torch.testing.assert_close(peer.forward(inputs)[0], expected)


def test_names_that_do_not_match() -> None:
    model = CausalLM.from_pretrained(checkpoint(CASES[0]))
    state = shared_weights(model)
    state["model.final.weight"] = state.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"it has model.norm.weight where they have model.final.weight"):
        make_peers(
            ["sdpa"],
            model.config.source,
            state,
            auto="AutoModelForCausalLM",
            dtype=model.dtype,
            device=CPU,
        )
    with pytest.raises(ValueError, match=r"does not know the family 'lama'.*--peers none"):
        make_peers(["sdpa"], {"model_type": "lama"}, {}, auto="AutoModel", dtype=model.dtype, device=CPU)


def test_decode_of_a_batch_that_does_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalLM.from_pretrained(checkpoint(CASES[0]))
    inputs = Inputs.of(Case("decode", 3, 20, 8), model.config.vocab_size, CPU)
    assert Taut(model).decode(inputs, 8, 4) > 0
    for room in ({"num_pages": 5, "max_rows": 3}, {"num_pages": 6, "max_rows": 2}):
        engine = Engine(model, **room)
        monkeypatch.setattr("taut.bench.subjects.Resident.engine", lambda *_, engine=engine: engine)
        with pytest.raises(DoesNotFit, match="not all 3 rows"):
            Taut(model).decode(inputs, 8, 4)
