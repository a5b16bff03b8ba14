"""Sampling on the device beside its reference, the engine's sampler and the distribution; compiled for sm_80
and sm_90."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from taut.engine.request import Request, SamplingParams
from taut.engine.sampler import Sampler
from taut.engine.sampler import uniform as engine_uniform
from taut.errors import RequestError
from taut.kernels import sample_triton
from taut.kernels.sample import Sampling, sample, sample_reference, uniform
from tests.kernels.compile import Spec, cross_compile

OPTIONS = [  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0), (0.0, 5, 0.5, 0.1), (1.0, 0, 1.0, 0.0), (0.7, 3, 1.0, 0.0), (1.5, 50, 0.9, 0.0),
    (1.0, 0, 0.3, 0.0), (2.0, 0, 0.99, 0.05), (1.0, 0, 1e-6, 0.0), (0.9, 1, 1.0, 0.0), (1.0, 10**6, 1.0, 0.2),
    (0.01, 40, 0.95, 0.0), (1.3, 7, 0.6, 0.3),
]  # fmt: skip


def sampling(options, seeds, steps, device="cpu") -> Sampling:
    columns = list(zip(*options, strict=True))
    types = (torch.float32, torch.int32, torch.float32, torch.float32)
    values = [torch.tensor(c, dtype=t, device=device) for c, t in zip(columns, types, strict=True)]
    return Sampling(*values, *(torch.tensor(v, dtype=torch.int64, device=device) for v in (seeds, steps)))


def rows_of(vocab: int, device: str = "cpu"):
    """Logits, half of them with many ties, and parameters of each row."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(2 * len(OPTIONS), vocab, generator=generator)
    logits[1::2] = logits[1::2].round()
    options = [o for o in OPTIONS for _ in range(2)]
    seeds = [(i * 0x9E3779B97F4A7C15 + 77) % 2**64 - 2**63 for i in range(len(options))]
    steps = [i * i for i in range(len(options))]
    return logits.to(device), sampling(options, seeds, steps, device), options, seeds, steps


@pytest.mark.parametrize(("candidates", "vocab"), [(16, 5), (16, 300), (2048, 2100)])  # 16: rows have more
def test_kernel_agrees_with_reference(candidates, vocab, monkeypatch) -> None:
    monkeypatch.setattr(sample_triton, "CANDIDATES", candidates)
    logits, how, *_ = rows_of(vocab)
    got, want = sample_triton.sample(logits, how), sample_reference(logits, how)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert sample(logits, how)[0].equal(want[0])


def test_reference_agrees_with_the_engine() -> None:
    logits, how, options, seeds, steps = rows_of(500)
    requests = []
    for (temperature, top_k, top_p, min_p), seed, step in zip(options, seeds, steps, strict=True):
        greedy = temperature == 0.0
        params = SamplingParams(
            greedy=greedy, temperature=1.0 if greedy else temperature, top_k=min(top_k, 500), top_p=top_p,
            min_p=min_p, seed=seed, max_new_tokens=10**6,
        )  # fmt: skip
        request = Request(id=0, prompt=[1], params=params)
        request.output.extend([0] * step)
        requests.append(request)
    tokens, _ = Sampler()(logits, requests)
    assert sample_reference(logits, how)[0].tolist() == tokens
    assert torch.equal(uniform(how.seeds, how.steps), engine_uniform(how.seeds, how.steps))


def test_rows_do_not_depend_on_their_batch() -> None:
    logits, how, *_ = rows_of(300)
    whole = sample_triton.sample(logits, how)[0]
    at = torch.tensor([7, 3, 20])
    some = Sampling(*(getattr(how, name)[at] for name in Sampling.__dataclass_fields__))
    assert torch.equal(sample_triton.sample(logits[at], some)[0], whole[at])


def test_rows_that_are_not_finite() -> None:
    logits = torch.zeros(5, 9)
    logits[0, 3], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, :8] = float("-inf")
    how = sampling([(1.0, 2, 0.5, 0.0)] * 5, [1] * 5, [0] * 5)
    for implementation in (sample_triton.sample, sample_reference):
        tokens, finite = implementation(logits, how)
        assert finite.tolist() == [False, False, False, True, True]
        assert tokens[3] == 8 and ((tokens >= 0) & (tokens < 9)).all()


def test_draws_follow_the_distribution() -> None:
    count = 4000
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0]).expand(count, 5)
    how = sampling([(1.0, 4, 1.0, 0.0)] * count, [11] * count, range(count))
    drawn = torch.bincount(sample_reference(logits, how)[0], minlength=5) / count
    want = logits[0].masked_fill(torch.tensor([0, 1, 0, 0, 0]).bool(), float("-inf")).softmax(0)
    assert (drawn - want).abs().max() < 0.03 and drawn[1] == 0


def test_errors() -> None:
    with pytest.raises(RequestError, match="for 2 rows of parameters"):
        sample(torch.zeros(3, 4), sampling([(0.0, 0, 1.0, 0.0)] * 2, [0, 0], [0, 0]))


def test_compiles() -> None:
    arguments = {"logits": "*fp32:16", "temperatures": "*fp32:16", "top_ks": "*i32:16", "top_ps": "*fp32:16"}
    arguments |= {"min_ps": "*fp32:16", "seeds": "*i64:16", "steps": "*i64:16", "tokens": "*i64:16"}
    arguments |= {"finite": "*i1:16", "vocab": "i32:16", "row_stride": "i32:16", "BLOCK": 2048}
    arguments |= {"values": "*fp32:16", "ids": "*i32:16", "FEW": 2048, "WIDE": 8192}
    specs = [
        Spec("taut.kernels.sample_triton", "_sample", a, arguments | {"PDL": a >= 90}, {"num_warps": 16})
        for a in (80, 90)
    ]
    assert all(built.local == 0 for built in cross_compile(specs))


@pytest.mark.gpu
def test_sweep_on_a_device() -> None:
    for vocab in (5, 1000, 32000, 50257, 151936):
        logits, how, *_ = rows_of(vocab, "cuda")
        got, want = sample(logits, how), sample_reference(logits, how)
        assert torch.equal(got[1], want[1])
        # Sums of a hundred thousand float32 weights may move a draw across a boundary.
        assert (got[0] != want[0]).sum() <= (1 if vocab > 10000 else 0)
        for dtype in (torch.float16, torch.bfloat16):
            low = logits.to(dtype)
            assert (sample(low, how)[0] != sample_reference(low, how)[0]).sum() <= 1
