"""Encoder-decoders in 4 and 8 bit: both stacks packed, saved and read, by transformers + bitsandbytes too."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from taut import AutoModelForSeq2SeqLM
from tests.families import checkpoint
from tests.quant.test_models import FORMATS, close, config, every_format, linears, off
from tests.scratch import scratch
from tests.seq2seq import BART, CASES, T5

AUTO = "AutoModelForSeq2SeqLM"
# The first case of every family, and plain and gated MLPs, shared and own tables.
FIRST = {case.family: case for case in reversed(CASES)}.values()
KINDS = [case for case in CASES if case in FIRST or case.name in ("t5-gated-unscaled", "marian-two-tables")]
every_kind = pytest.mark.parametrize("case", KINDS, ids=str)


def load(path, **options):
    return AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32, **options)


def ids(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, source: int = 14, target: int = 9) -> torch.Tensor:
    return model(ids(source, 0), decoder_input_ids=ids(target, 1)).logits.float()


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
@every_kind
def test_both_stacks_compute_with_packed_weights_and_keep_every_byte(case, name, tmp_path):
    path = checkpoint(case, AUTO)
    model, dense = load(path, quantization_config=config(name)), load(path)
    whole = {"lm_head"} | (
        {n for n in linears(model) if "down_proj" in n} if "t5" in case.family.lower() else set()
    )
    for module_name, module in linears(model).items():
        assert (module.packed is None) == (module_name in whole), module_name
        if module.packed is not None:
            with torch.no_grad():
                dense.get_submodule(module_name).weight.copy_(module.packed.dequantize(torch.float32))
    if name == "int8":  # activations are in 8 bits too
        assert off(logits(model), logits(dense)) < 0.1
    else:
        close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    load(tmp_path / "twice").save_pretrained(tmp_path / "third")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["nf4-double", "int8"])
@every_kind
def test_padded_batches_attention_and_streaming_combine(case, name, attention):
    model = load(checkpoint(case, AUTO), quantization_config=config(name), attn_implementation=attention)
    rows, target = [ids(9, 1), ids(4, 2)], ids(6, 3)
    source, mask = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 9, dtype=torch.int64)
    for row, one in enumerate(rows):
        source[row, : one.shape[1]], mask[row, : one.shape[1]] = one, 1
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    with torch.no_grad():
        together = model(source, attention_mask=mask, decoder_input_ids=target.repeat(2, 1)).logits
        made = model.generate(source, attention_mask=mask, **options)
        for row, one in enumerate(rows):
            alone = model(one, decoder_input_ids=target).logits[0]
            if name == "int8":  # a row's neighbours decide which columns are outliers
                assert off(together[row], alone) < 0.05
                continue
            close(together[row], alone)
            assert torch.equal(made[row], model.generate(one, **options)[0])
    streamed: list[int] = []
    streamer = SimpleNamespace(put=lambda new: streamed.extend(new.view(-1).tolist()), end=lambda: None)
    whole = model.generate(rows[0], streamer=streamer, **options)
    assert streamed[-5:] == whole[0, -5:].tolist()


# Rows of whole blocks: bitsandbytes' CPU code dequantizes others wrongly.
ALIGNED = {
    "T5": T5 | {"d_model": 128, "d_kv": 32, "d_ff": 192, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    "Bart": BART
    | {"d_model": 128, "encoder_ffn_dim": 192, "decoder_ffn_dim": 128}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


@functools.cache
def aligned(kind: str) -> Path:
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**ALIGNED[kind])
    )
    for param in model.parameters():
        if param.dim() >= 2:
            torch.nn.init.normal_(param, std=0.08)
    folder = scratch("quant") / kind
    model.save_pretrained(folder)
    return folder


def theirs(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", device_map="cpu", **options
        ).train()  # in inference, bitsandbytes' CPU code computes 4-bit layers in bfloat16
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = module.activation_dropout = module.attention_dropout = 0.0
    return model


@pytest.mark.parametrize("kind", ALIGNED)
@every_format
def test_transformers_reads_what_taut_saves_and_the_other_way_round(kind, name, tmp_path):
    ours = load(aligned(kind), quantization_config=config(name))
    reference = theirs(aligned(kind), quantization_config=transformers.BitsAndBytesConfig(**FORMATS[name]))

    def agree(other):
        if name != "int8":
            return close(logits(ours), logits(other), 2e-4)
        # In training, bitsandbytes' CPU code multiplies by the dequantized weight; else it rounds inputs too.
        exact, rounded = logits(other), logits(other.eval())
        assert off(logits(ours), exact) < 1.3 * off(rounded, exact)

    agree(reference)
    reference.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    mine, other = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, other[key]), key
    agree(theirs(tmp_path / "ours"))
    assert torch.equal(logits(load(tmp_path / "theirs")), logits(ours))
