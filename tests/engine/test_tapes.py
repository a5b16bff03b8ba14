"""Recorded forwards on the CPU: the tokens of a model without them, whatever batches follow one another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taut.engine import tapes
from taut.engine.engine import Engine
from taut.engine.request import Request, SamplingParams
from taut.kernels.threads import missing_threads
from taut.modeling import CausalLM

pytestmark = pytest.mark.skipif(missing_threads() is not None, reason=str(missing_threads()))

ROOT = Path(__file__).parents[2]

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
ANGLES_BY_LENGTH = LLAMA | {
    "rope_scaling": {"rope_type": "dynamic", "factor": 64.0},
    "max_position_embeddings": 16,
}
EXPERTS = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def model(config, dtype=torch.float32) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM.from_config(config, dtype=dtype).init_weights(std=0.3).eval()


def served(found: CausalLM, used: bool = True) -> list[list[int]]:
    """What rows of unlike lengths, which begin and end at different steps, go on with. The longest outgrows
    the pages that a tape has at first."""
    engine = Engine(found, max_rows=4, num_pages=128, page_size=16)
    rows = [([3 + i, 5, 7 * i + 1], 4 + 3 * i) for i in range(5)] + [([9] * 505, 20)]
    requests = [Request(ids, SamplingParams(max_new_tokens=n, temperature=0.0)) for ids, n in rows]
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        engine.step()
    kept = engine.runner.scores._tapes
    assert bool([tape for tape in kept.values() if tape is not None]) == used
    return [request.output for request in requests]


@pytest.mark.parametrize("config", [LLAMA, ANGLES_BY_LENGTH], ids=["llama", "angles by length"])
def test_tokens_are_those_without_tapes(config, monkeypatch) -> None:
    found = model(config)
    got = served(found)
    monkeypatch.setattr(tapes, "refuses", lambda model: "asked not to")
    assert got == served(found, used=False)
    assert len({tuple(row) for row in got}) == len(got)


def test_weights_that_change_in_place_are_read_anew() -> None:
    found = model(LLAMA)
    ids = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
    before = found.generate(ids, **options).tolist()
    with torch.no_grad():
        found.model.layers[1].mlp.down_proj.weight.neg_()
    after = found.generate(ids, **options).tolist()
    found.free_cache()
    assert after == found.generate(ids, **options).tolist() != before


def test_what_watches_modules_sees_every_token() -> None:
    found, seen = model(LLAMA), []
    engine = Engine(found, max_rows=1, num_pages=8, page_size=16)

    def step(count: int) -> None:
        for _ in range(count):
            engine.step()

    engine.submit(Request([3, 4, 5], SamplingParams(max_new_tokens=12, temperature=0.0)))
    step(4)
    handle = found.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    step(3)
    handle.remove()
    step(2)
    assert len(seen) == 3


def test_a_recording_does_not_import_pytorchs_compiler() -> None:
    """Which takes a second of the first answer, and 120 MB."""
    code = "from tests.engine.test_tapes import LLAMA, model, served; import sys; served(model(LLAMA))\n"
    code += "print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


def test_experts_are_not_recorded() -> None:
    assert "experts" in tapes.refuses(model(EXPERTS))
    served(model(EXPERTS), used=False)
