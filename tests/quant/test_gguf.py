"""GGUF files whose matrices stay packed: the same model as their values make, and what is refused."""

from __future__ import annotations

import gguf
import pytest
import torch

from taut import AutoModelForCausalLM
from taut.errors import RequestError
from taut.kernels.dispatch import compiled_refuses
from taut.quant.affine import FORMATS
from tests.checkpoint.gguf_files import convert
from tests.checkpoint.test_gguf_model import tiny
from tests.quant.test_models import linears, off

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = {"Q4_0": "affine4", "Q4_1": "affine4", "Q8_0": "affine8"}


@pytest.fixture(
    scope="module", params=[(f, k) for f in FORMATS for k in ("llama", "qwen2", "phi3")], ids="-".join
)
def file(request, tmp_path_factory):
    kind, family = request.param
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(tiny(family), path, getattr(gguf.GGMLQuantizationType, kind))
    return kind, path


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.skipif(compiled_refuses(torch.empty(0)) is not None, reason="this CPU has no kernels for them")
def test_matrices_stay_packed_and_mean_what_the_file_says(file, tmp_path):
    kind, path = file
    packed, dense = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for dtype in ("auto", "float32"))
    assert not dense.is_quantized and packed.is_quantized and packed.quantization_config is None
    assert {name for name, m in linears(packed).items() if m.packed is None} <= {"lm_head"}
    assert packed.memory_by_format()[KINDS[kind]] > sum(packed.memory_by_format().values()) / 2
    assert packed.num_parameters() == dense.num_parameters()
    assert off(logits(packed), logits(dense)) < 0.03  # bfloat16
    assert off(logits(packed.to(torch.float32)), logits(dense)) < 2e-3  # biases have been rounded
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(packed.generate(IDS, **options), dense.generate(IDS, **options))
    packed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.is_quantized and off(logits(again), logits(packed)) < 1e-5


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_packing_it_again_is_refused(file, options):
    kind, path = file
    with pytest.raises(RequestError, match=rf"quantized already \({kind}\); quantizing it again"):
        AutoModelForCausalLM.from_pretrained(path, **options)
