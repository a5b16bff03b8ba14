"""The commands on a tiny encoder-decoder with a tokenizer of letters."""

from __future__ import annotations

import json

import pytest
import torch

from taut import AutoModelForSeq2SeqLM, AutoTokenizer
from tests.cli.test_quantize import run
from tests.families import checkpoint
from tests.seq2seq import CASES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    case = next(case for case in CASES if case.name == "marian")
    for file in checkpoint(case, "AutoModelForSeq2SeqLM").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"num_beams": 4}))
    letters = {chr(32 + i): 3 + i for i in range(95)} | {"<pad>": 0, "<unk>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def test_generate_says_what_the_model_says_to_the_prompt(model):
    result = run("generate", model, "some text", "--json", "--device", "cpu", "--max-new-tokens", "7")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    loaded, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer.encode("some text")])
    want = loaded.generate(ids, num_beams=1, max_new_tokens=7)[0, 1:].tolist()
    assert found["token_ids"] == want and found["facts"]["prompt_tokens"] == ids.shape[1]
    assert found["text"] == tokenizer.decode(want, skip_special_tokens=True)


def test_quantize_and_eval(model, tmp_path):
    result = run("quantize", model, tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0 and "nf4" in result.output, result.output
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").is_loaded_in_4bit
    result = run("eval", model, "--device", "cpu")
    assert result.exit_code == 1 and "is an encoder-decoder" in result.output
