"""What runs where, and why not something else: the plan, the names of attention, and the context managers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import taut
from taut import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from taut.errors import RequestError
from taut.kernels import attention
from taut.kernels.attention import Scoring
from taut.kernels.onednn import computes
from tests.families import CASES, checkpoint
from tests.seq2seq import CASES as SEQ2SEQ

LLAMA = CASES[0]
GEMMA2 = next(case for case in CASES if case.name == "gemma2")
IDS = torch.tensor([[5, 9, 17, 3]])
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def load(case=LLAMA, **options):
    return AutoModelForCausalLM.from_pretrained(checkpoint(case), **options)


def test_the_plan_names_each_choice_and_the_reasons_against_the_others():
    plan = load(GEMMA2).plan()
    choice = next(c for c in plan.choices if c.op == "attention of even rows")
    assert (choice.first, choice.last, choice.chosen) == (0, 2, "eager")
    assert [name for name, _ in choice.passed] == ["paged", "cudnn", "flash", "packed", "sdpa"]
    assert "has no soft-cap (asked: 50.0)" in dict(choice.passed)["sdpa"]
    text = str(plan)
    assert "attention of a decode step" in text and "no soft-cap" in text


def test_only_layers_with_experts_have_a_line_for_them():
    model = load(next(case for case in CASES if case.name == "qwen3-moe-some-layers"))
    lines = [(c.first, c.last) for c in model.plan().choices if c.op == "experts"]
    assert lines == [(1, 1)]
    packed = load(next(case for case in CASES if case.name == "mixtral"), load_in_4bit=True)
    (line,) = [c for c in packed.plan().choices if c.op == "experts"]
    if not torch.cuda.is_available():
        assert line.chosen == "a product for each expert in use"
        assert dict(line.passed)["unpacked, one grouped product"] == "runs on NVIDIA GPUs, not on cpu"


@no_gpu
def test_the_plan_says_what_an_activation_is_part_of():
    model = load(next(case for case in CASES if case.name == "opt"), dtype=torch.float32)
    choice = next(c for c in model.plan().choices if c.op == "relu behind a product of 512 rows")
    assert choice.passed[0] == ("cuBLAS, with the product", "runs on NVIDIA GPUs, not on cpu")
    assert choice.chosen == ("oneDNN, with the product" if computes(torch.float32) else "PyTorch, by itself")


def test_layers_that_run_alike_share_a_line():
    model = load()
    model.model.layers[1].self_attn.only = ("eager",)
    lines = [c for c in model.plan().choices if c.op == "attention of a decode step"]
    assert [(c.first, c.last, c.chosen) for c in lines] == [(0, 0, "sdpa"), (1, 1, "eager"), (2, 2, "sdpa")]


@pytest.fixture
def called(monkeypatch):
    """The names of the candidates that are called, in order."""
    called = []

    def watch(name, candidate):
        def run(*call):
            called.append(name)
            return candidate.run(*call)

        return replace(candidate, run=run)

    watched = {name: watch(name, c) for name, c in attention.CANDIDATES.items()}
    monkeypatch.setattr(attention, "CANDIDATES", watched)
    return called


def test_the_plan_is_what_runs(called):
    """A candidate that would be chosen is the one that is called."""
    model = load()
    model(IDS)
    choice = next(c for c in model.plan().choices if c.op == "attention of even rows")
    assert called == [choice.chosen] * 3


def test_an_encoder_decoder_counts_its_stacks_apart_and_lists_what_attends_to_the_source(called):
    case = next(case for case in SEQ2SEQ if case.name == "bart-uneven-scaled")
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint(case, "AutoModelForSeq2SeqLM"))
    model.decoder.layers[1].encoder_attn.only = ("eager",)
    with torch.inference_mode():
        model(IDS, decoder_input_ids=IDS)
    choices = model.plan().choices
    own = [(c.stack, c.first, c.last, c.chosen) for c in choices if c.op == "attention of even rows"]
    cross = [(c.stack, c.first, c.last, c.chosen) for c in choices if "encoder's" in c.op]
    assert own == [("encoder", 0, 0, "sdpa"), ("decoder", 0, 2, "packed")]
    assert cross == [("decoder", i, i, name) for i, name in enumerate(("packed", "eager", "packed"))]
    assert called == ["sdpa", "packed", "packed", "packed", "eager", "packed", "packed"]
    assert {c.stack for c in choices if "cached" in c.op} == {"decoder"}
    assert "decoder 0-2" in str(model.plan())


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (LLAMA, {"use_flash_attention_2": True, "dtype": "float32"}, "takes float16 and bfloat16"),
        (LLAMA, {"use_flash_attention_2": True, "attn_implementation": "sdpa"}, "ask for two things"),
        (GEMMA2, {"attn_implementation": "sdpa"}, "can't run layer 0 .*soft-cap.*attn_implementation='auto'"),
        (GEMMA2, {"strict": True}, "strict=True can't run layer 0 .*sdpa: .*soft-cap.*strict=False"),
        pytest.param(
            LLAMA,
            {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"},
            "paged: reads keys from cache pages only; flash: runs on NVIDIA GPUs",
            marks=no_gpu,
        ),
    ],
)
def test_what_a_model_cannot_have_is_an_error_at_load(case, options, message):
    with pytest.raises(RequestError, match=message):
        load(case, **options)


def test_strict_loads_where_nothing_falls_back(monkeypatch):
    model = load(strict=True)
    assert torch.equal(model(IDS).logits, load()(IDS).logits)
    for strict, free in zip(model.plan().choices, load().plan().choices, strict=True):
        assert strict.chosen == free.chosen, strict.op
    monkeypatch.setattr("taut.modeling.base.compiled_refuses", lambda like: "wants llvmlite")
    with pytest.raises(RequestError, match=r"strict=True, but cpu would run reference .*: wants llvmlite"):
        load(strict=True)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_context_manager_restricts_and_lists_reasons(name):
    model, capped = load(), load(GEMMA2)
    with taut.attention_kernel(name):
        model(IDS)
        model.generate(IDS, max_new_tokens=2)
        if name == "sdpa":
            with pytest.raises(RequestError, match=r"eager: not among .*\(sdpa\)"):
                capped(IDS)
    capped(IDS)
    with pytest.raises(RequestError, match=r"attention kernel 'sdp' is unknown; known: .*; nearest: sdpa"):
        taut.attention_kernel("sdp").__enter__()


def test_pytorchs_own_context_manager_restricts_the_reference_too():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(RequestError, match="eager: PyTorch's sdpa_kernel leaves math attention out"):
            load(GEMMA2)(IDS)
        load()(IDS)
    nothing = pytest.raises(RequestError, match=r"leaves out what it has here \(flash, math\); eager: ")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), nothing:
        load()(IDS)


@pytest.mark.filterwarnings("ignore:Flash attention kernel not used")
def test_a_call_that_pytorchs_kind_cannot_take_lists_reasons_too():
    q, starts = torch.randn(5, 2, 8), torch.tensor([0, 3, 5], dtype=torch.int32)
    learned = Scoring(0.3, relative=torch.randn(2, 9, requires_grad=True))
    attention.attention(q, q, q, starts, 3, learned)
    nothing = pytest.raises(RequestError, match=r"sdpa: PyTorch: No available kernel.*; eager: ")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), nothing:
        attention.attention(q, q, q, starts, 3, learned)
