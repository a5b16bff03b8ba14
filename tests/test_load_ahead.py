"""Loads that read ahead give the bytes of loads that don't: on the CPU by a stand-in, and on a GPU."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from safetensors.torch import load_file

from taut import AutoModelForCausalLM, BitsAndBytesConfig, weights
from taut.checkpoint import ahead
from taut.checkpoint.base import Span
from taut.errors import CheckpointError
from tests.families import CASES, checkpoint
from tests.scratch import scratch
from tests.standin import Standin

# Parts, fused in groups, transposed, experts one by one and stacked.
FAMILIES = ["llama", "gpt-neox", "gpt2", "falcon-40b", "qwen3-moe", "gpt-oss"]
FORMATS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "fp4": {"dtype": torch.bfloat16, "load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
STORED = ("nf4-double", "int8")  # in files of their own, too
every_format = pytest.mark.parametrize("form", [*FORMATS, *(f"{form} stored" for form in STORED)])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buffers that go round many times, of slices that go through several."""
    monkeypatch.setattr(ahead, "CHUNK", 1000)
    monkeypatch.setattr(ahead, "BUFFERS", 5)
    monkeypatch.setattr(ahead, "THREADS", 3)
    monkeypatch.setattr(weights, "_SLICE_BYTES_AHEAD", 5000)


@functools.cache
def folder(name, form):
    if not form.endswith(" stored"):
        return checkpoint(next(case for case in CASES if case.name == name))
    path = scratch("stored")
    load(name, form.removesuffix(" stored")).save_pretrained(path)
    return path


def load(name, form, device="cpu"):
    options = dict(FORMATS.get(form, {}))
    dtype = options.pop("dtype", torch.bfloat16)
    if options:
        options = {"quantization_config": BitsAndBytesConfig(**options)}
    return AutoModelForCausalLM.from_pretrained(folder(name, form), dtype=dtype, device=device, **options)


def tensors(name, form):
    for file in folder(name, form).glob("*.safetensors"):
        yield from load_file(file).values()


def check_same(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert (tensor.dtype, tensor.device) == (want[name].dtype, want[name].device), name
        assert torch.equal(tensor, want[name]), name


@every_format
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_are_the_same(name, form, monkeypatch):
    want, standin = load(name, form), Standin()
    monkeypatch.setattr(weights, "target_of", lambda device: standin)
    check_same(load(name, form), want)
    total = sum(tensor.nbytes for tensor in tensors(name, form))
    # Of what is stored packed, codes alone are read ahead, and not scales.
    assert standin.copied >= total * (0.5 if "stored" in form else 1)


def test_a_file_that_ends_early_leaves_no_thread(monkeypatch):
    def short(out, path, offset):
        if offset > 50_000:
            raise CheckpointError(f"{path}: ended at byte {offset}")
        read(out, path, offset)

    read = ahead.read_into
    monkeypatch.setattr(ahead, "read_into", short)
    monkeypatch.setattr(weights, "target_of", lambda device: Standin())
    for form in ("bfloat16", "nf4"):
        with pytest.raises(CheckpointError, match="ended at byte"):
            load("llama", form)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("taut-read")]


@pytest.mark.gpu
@every_format
@pytest.mark.parametrize("name", FAMILIES)
def test_on_a_gpu_the_bytes_are_those_of_a_load_that_waits(name, form, monkeypatch):
    got = load(name, form, "cuda")
    monkeypatch.setattr(weights, "target_of", lambda device: None)
    check_same(got, load(name, form, "cuda"))
    if form != "nf4-double":  # whose mean of scales is a sum in another order
        check_same(got, load(name, form).to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_a_model_is_there_for_every_stream_once_it_is_loaded(form):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        load("llama", form, "cuda")
        assert stream.query()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_load_onto_another_gpu_leaves_the_current_one_alone():
    want, held = load("llama", "bfloat16"), torch.cuda.memory_allocated()
    got = load("llama", "bfloat16", "cuda:1")
    assert torch.cuda.current_device() == 0 and torch.cuda.memory_allocated() == held
    check_same(got.to("cpu"), want)


@pytest.mark.gpu
def test_a_gpu_that_is_late_has_read_a_buffer_before_it_is_filled_again(tmp_path):
    weight = torch.randint(256, (400_000,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(bytes(weight.numpy()))
    spans = [Span(tmp_path / "file", at, 50_000) for at in range(0, 400_000, 50_000)]
    reads = ahead.ReadAhead(spans, ahead.Cuda(torch.device("cuda")))
    torch.cuda._sleep(200_000_000)
    found = [reads.read(span) for span in spans]
    reads.close()
    assert torch.equal(torch.cat(found).cpu(), weight)
