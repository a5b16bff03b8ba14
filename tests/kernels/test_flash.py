"""Flash attention beside the float64 reference: small shapes in the interpreter, larger ones on a device
(marked `gpu`); and compiled for sm_80 and sm_90."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl

from taut.errors import RequestError
from taut.kernels import flash, flash_hopper, flash_hopper_backward
from taut.kernels.attention import Pages, Scoring, _reference
from tests.kernels.compile import Spec, cross_compile

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """`torch.empty` gives NaN, so that an element nobody writes is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough that a few dozen tokens take every loop."""
    dims = (16, 32, 64)
    tiles = {"forward": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dkdv": (16, 32, 4, 1)}
    monkeypatch.setattr(flash, "_TILES", {name: dict.fromkeys(dims, tile) for name, tile in tiles.items()})


def boundaries(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def distance(got: Tensor, want: Tensor) -> float:
    """Relative error in norm; NaN where something is not finite."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-9)).item()


def agree(lengths, heads, kv_heads, dim, scoring: Scoring, dtype=torch.float16, device="cpu") -> None:
    generator = torch.Generator(device).manual_seed(sum(lengths) * 31 + dim)
    starts = boundaries(lengths, device)
    q, k, v, do = (
        torch.randn(sum(lengths), h, dim, generator=generator, device=device, dtype=dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]
    extra = {n: t for n in ("relative", "sinks") if (t := getattr(scoring, n)) is not None}
    inputs += [t.requires_grad_() for t in extra.values()]
    out = flash.flash_attention(q, k, v, starts, max(lengths), scoring)
    got = (out, *torch.autograd.grad(out, inputs, do))

    wide = [t.detach().double().requires_grad_() for t in inputs]
    scoring = replace(scoring, **dict(zip(extra, wide[3:], strict=True)))
    want = _reference(*wide[:3], starts, max(lengths), scoring, None)
    want = (want, *torch.autograd.grad(want, wide, do.double()))
    bound = 1e-2 if dtype == torch.bfloat16 else 1.5e-3
    errors = dict(zip(("out", "dq", "dk", "dv", *extra), map(distance, got, want), strict=False))
    assert all(error < bound for error in errors.values()), errors


ODD = [5, 0, 33, 1, 70]
CASES = {  # lengths, heads, key heads, head dim, scoring
    "causal": (ODD, 2, 2, 16, Scoring(0.25)),
    "full": (ODD, 2, 2, 16, Scoring(0.25, causal=False)),
    "grouped, odd dim": ([40, 17], 4, 2, 20, Scoring(0.2)),
    "odd heads over one": ([37, 20], 3, 1, 16, Scoring(0.25)),
    "causal window": ([70, 9], 2, 1, 16, Scoring(0.25, window=21)),
    "window of two": ([40], 1, 1, 16, Scoring(0.25, window=2)),
    "window both sides": ([70, 9], 1, 1, 16, Scoring(0.25, causal=False, window=20)),
    "soft-cap": ([50], 2, 2, 16, Scoring(0.25, softcap=1.5)),
    "soft-cap, window": ([50], 1, 1, 16, Scoring(0.25, softcap=1.5, window=18)),
    "alibi": ([45, 12], 2, 2, 16, Scoring(0.25, slopes=torch.tensor([0.5, 0.125]))),
    "sinks": (ODD, 4, 2, 16, Scoring(0.25, sinks=torch.tensor([1.0, -2.0, 0.5, 3.0]))),
    "sinks, window": ([50], 2, 1, 16, Scoring(0.25, window=9, sinks=torch.tensor([0.3, -0.1]))),
    "relative": ([60, 12], 2, 1, 16, Scoring(0.25, causal=False, relative=torch.randn(2, 21))),
}


@pytest.mark.skipif(CUDA, reason="the device sweep covers it")
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name, small_tiles):
    agree(*CASES[name])


def test_no_tokens_at_all():
    q = torch.zeros(0, 2, 16, dtype=torch.float16, device="cuda" if CUDA else "cpu", requires_grad=True)
    out = flash.flash_attention(q, q, q, boundaries([0, 0], str(q.device)), 0, Scoring(0.25))
    assert out.shape == (0, 2, 16)
    out.sum().backward()
    assert q.grad.shape == (0, 2, 16)


def paged(query_lengths, key_lengths, heads, kv_heads, dim, size, dtype, device, spare=3):
    """Queries, and `Pages` whose pages are shuffled and whose unused table entries point nowhere."""
    needed = [-(-n // size) for n in key_lengths]
    order = (torch.randperm(sum(needed)) + spare).tolist()
    table = torch.full((len(needed), max(needed) + 1), 1 << 30, dtype=torch.int32)
    for row, count in enumerate(needed):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    shape = (sum(needed) + spare, size, kv_heads, dim)
    keys, values = (torch.randn(shape, dtype=dtype).to(device) for _ in range(2))
    lengths = torch.tensor(key_lengths, dtype=torch.int32)
    q = torch.randn(sum(query_lengths), heads, dim, dtype=dtype).to(device)
    return q, Pages(keys, values, table.to(device), lengths.to(device), max(key_lengths))


def wide(pages: Pages) -> Pages:
    return replace(pages, keys=pages.keys.double(), values=pages.values.double())


@pytest.mark.skipif(CUDA, reason="the device sweep covers it")
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.25),
        Scoring(0.25, window=11),
        Scoring(0.25, causal=False),
        Scoring(0.25, sinks=torch.tensor([2.0, -1.0])),
    ],
)
def test_keys_from_pages(scoring, small_tiles):
    torch.manual_seed(1)
    queries = [1, 0, 33, 20]
    q, pages = paged(queries, [50, 3, 33, 41], 2, 1, 16, 8, torch.float16, "cpu")
    starts = boundaries(queries, "cpu")
    got = flash.flash_attention(q, None, None, starts, max(queries), scoring, pages)
    want = _reference(q.double(), None, None, starts, max(queries), scoring, wide(pages))
    assert distance(got, want) < 1.5e-3


@pytest.mark.skipif(CUDA, reason="the device sweep covers it")
def test_sinks_are_added_to_what_a_kernel_without_them_gives():
    """As the Hopper kernels do it: their output and LSE, then `_add_sinks`."""
    q, k, v = (torch.randn(70, 2, 16, dtype=torch.float16) for _ in range(3))
    starts, sinks = boundaries([20, 50], "cpu"), torch.tensor([1.5, -2.0])
    plain = (starts, starts, None, None, None, None)
    out, without = flash._forward_pass(q, k, v, *plain, None, 0.25, True, -1, 0.0, len(q))
    lse = torch.full_like(without, float("nan"))
    without[1, 3] = float("inf")  # a query that has seen nothing
    out[3, 1] = 0
    flash._add_sinks[(2, 2)](
        out, without, lse, sinks, 70, out.stride(0), out.stride(1), DIM=16, BLOCK_D=16, BLOCK_M=64
    )
    want, sums = flash._forward_pass(q, k, v, *plain, sinks, 0.25, True, -1, 0.0, len(q))
    want[3, 1], sums[1, 3] = 0, sinks[1] * flash.LOG2E
    assert distance(out, want.double()) < 1.5e-3
    torch.testing.assert_close(lse, sums)


def test_pages_have_no_backward_pass():
    q, pages = paged([4], [4], 1, 1, 16, 8, torch.float16, "cuda" if CUDA else "cpu")
    out = flash.flash_attention(
        q.requires_grad_(), None, None, boundaries([4], str(q.device)), 4, Scoring(0.25), pages
    )
    with pytest.raises(RequestError, match="no backward pass"):
        out.sum().backward()


def test_queries_that_see_nothing_give_zeros(small_tiles):
    """More queries than keys under a causal mask: the first ones come before every key."""
    device = "cuda" if CUDA else "cpu"
    q = torch.randn(40, 1, 16, dtype=torch.float16, device=device, requires_grad=True)
    k, v = (torch.randn(25, 1, 16, dtype=torch.float16, device=device, requires_grad=True) for _ in range(2))
    out = flash.flash_attention(
        q, k, v, boundaries([40], device), 40, Scoring(0.25), key_starts=boundaries([25], device)
    )
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[:15].any() and not dq[:15].any()
    starts = boundaries([25], device)
    alone = _reference(q[15:].double(), k.double(), v.double(), starts, 25, Scoring(0.25), None)
    assert distance(out[15:], alone) < 1.5e-3
    assert dk.isfinite().all() and dv.isfinite().all()


def test_cross_attention(small_tiles):
    device = "cuda" if CUDA else "cpu"
    queries, keys = [9, 0, 40], [33, 4, 20]
    q = torch.randn(49, 2, 16, dtype=torch.float16, device=device)
    k, v = (torch.randn(57, 2, 16, dtype=torch.float16, device=device) for _ in range(2))
    q_starts, k_starts = boundaries(queries, device), boundaries(keys, device)
    scoring = Scoring(0.25, causal=False)
    out = flash.flash_attention(q, k, v, q_starts, 40, scoring, key_starts=k_starts)
    for row in range(3):
        mine, theirs = slice(*q_starts[row : row + 2]), slice(*k_starts[row : row + 2])
        scores = torch.einsum("qhd,khd->hqk", q[mine].double(), k[theirs].double()) * 0.25
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[theirs].double())
        assert distance(out[mine], want) < 1.5e-3


def test_a_row_knows_nothing_of_its_neighbours(small_tiles):
    device = "cuda" if CUDA else "cpu"
    dim = 64 if CUDA else 16
    q, k, v = (torch.randn(60, 2, dim, dtype=torch.float16, device=device) for _ in range(3))
    starts = boundaries([25, 35], device)
    before = flash.flash_attention(q, k, v, starts, 35, Scoring(0.25))
    q[25:], k[25:], v[25:] = math.nan, math.nan, math.inf
    after = flash.flash_attention(q, k, v, starts, 35, Scoring(0.25))
    assert torch.equal(before[:25], after[:25])


def test_reasons():
    q = torch.zeros(3, 2, 64, dtype=torch.float16)
    for bad, scoring, why in (
        (q.float(), Scoring(1.0), "float16 and bfloat16, not float32"),
        (q.new_zeros(3, 2, 288), Scoring(1.0), "up to 256, not 288"),
        (q, Scoring(-1.0), "scale above 0"),
        (q, Scoring(1.0), "on cpu"),
    ):
        assert why in flash.why_not(bad, scoring)
    with pytest.raises(RequestError, match="multiple of the key heads"):
        flash.flash_attention(q, q.repeat(1, 2, 1)[:, :3], q, boundaries([3], "cpu"), 3, Scoring(1.0))


def spec(kernel: str, arch: int, dim: int, **flags) -> Spec:
    """One of the kernels of `flash` with the tile it runs with on `arch`."""
    tiles = flash._TILES_HOPPER if arch == 90 else flash._TILES
    part = {"_forward": "forward", "_backward_dq": "dq", "_backward_dkdv": "dkdv"}.get(kernel)
    m, n, warps, stages = tiles[part][flash.block_dim(dim)] if part else (64, 64, 4, 3)
    settings = {
        "CAUSAL": True,
        "WINDOW": False,
        "SOFTCAP": False,
        "ALIBI": False,
        "RELATIVE": False,
        "SINKS": False,
        "PAGE": 0,
        "D_RELATIVE": False,
        "DIM": dim,
        "BLOCK_D": flash.block_dim(dim),
        "BLOCK_M": m,
        "BLOCK_N": n,
    } | flags
    types = {
        **dict.fromkeys(("Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV"), "*bf16:16"),
        **dict.fromkeys(("LSE", "WITH", "DELTA", "d_relative"), "*fp32:16"),
        **dict.fromkeys(("starts", "key_starts", "lengths", "table"), "*i32:16"),
        **dict.fromkeys(("scale", "softcap", "true_scale"), "fp32"),
        **dict.fromkeys(("tokens", "rows", "group", "split", "window", "reach"), "i32"),
        "slopes": "*fp32:16" if settings["ALIBI"] else None,
        "relative": "*fp32:16" if settings["RELATIVE"] else None,
        "sinks": "*bf16:16" if settings["SINKS"] else None,
    }
    names = getattr(flash, kernel).arg_names
    arguments = {name: settings.get(name, types.get(name, "i32:16")) for name in names}
    return Spec("taut.kernels.flash", kernel, arch, arguments, {"num_warps": warps, "num_stages": stages})


def test_compiles_for_ampere_and_hopper():
    specs = [
        spec("_forward", 80, 128),
        spec("_backward_dq", 80, 64),
        spec("_backward_dkdv", 80, 64, SOFTCAP=True),
        spec("_forward", 90, 96, PAGE=16, ALIBI=True),
        spec("_forward", 90, 64, WINDOW=True, SINKS=True),
        spec("_backward_dkdv", 90, 80),
        spec("_add_sinks", 90, 64, SINKS=True),
    ]
    for asked, built in zip(specs, cross_compile(specs), strict=True):
        assert built.wgmma == (asked.arch == 90 and asked.kernel != "_add_sinks")
        assert built.shared <= (227 << 10 if asked.arch == 90 else 99 << 10), (asked.kernel, built)
        assert built.stack <= 256, (asked, built)  # spilled registers


def hopper_specs() -> list[Spec]:
    """The three kernels of the copy engine and the warpgroups, with their tiles at head dim 128."""

    def tile(block: int, dim: int = 128) -> str:
        return f"tensordesc<bf16[{block}, {dim}],{flash_hopper._layout(block, dim)!r}>"

    def vector(block: int) -> str:
        return f"tensordesc<fp32[{block}],{gl.NVMMASharedLayout(0, 32, rank=1)!r}>"

    common = {
        **dict.fromkeys(("tokens", "width", "rows", "group", "split", "window"), "i32"),
        **dict.fromkeys(("scale", "softcap", "true_scale"), "fp32"),
        **dict.fromkeys(("starts", "key_starts"), "*i32:16"),
        **dict.fromkeys(("lse", "delta"), "*fp32:16"),
        **dict.fromkeys(("out", "dk_out", "dv_out"), "*bf16:16"),
        **{
            "slopes": None,
            "D": 128,
            "ROWS": 64,
            "CAUSAL": True,
            "WINDOW": False,
            "SOFTCAP": False,
            "ALIBI": False,
        },
    }
    wgs, rows, n, stages, turns, hold, launch = flash_hopper._TILES[128]
    load, multiply = flash_hopper._REGISTERS[launch]
    forward = {
        "q_desc": tile(rows),
        "k_desc": tile(n),
        "v_desc": tile(n),
        "WGS": wgs,
        "N": n,
        "STAGES": stages,
        "PINGPONG": turns,
        "HOLD": hold,
        "LOAD_REGS": load,
        "MULTIPLY_REGS": multiply,
    }
    n, stages = flash_hopper_backward._DQ_TILES[128]
    dq = {
        "q_desc": tile(64),
        "do_desc": tile(64),
        "k_desc": tile(n),
        "v_desc": tile(n),
        "N": n,
        "STAGES": stages,
    }
    ((m, stages, dk, dv),) = flash_hopper_backward._DKDV_TILES[128]
    dkdv = {
        "q_desc": tile(m),
        "do_desc": tile(m),
        "lse_desc": vector(m),
        "delta_desc": vector(m),
        "k_desc": tile(64),
        "v_desc": tile(64),
        "M": m,
        "STAGES": stages,
        "DK": dk,
        "DV": dv,
    }
    specs = []
    for module, kernel, own in (
        ("flash_hopper", "_forward", forward),
        ("flash_hopper_backward", "_dq", dq),
        ("flash_hopper_backward", "_dkdv", dkdv),
    ):
        module = f"taut.kernels.{module}"
        names = getattr(importlib.import_module(module), kernel).arg_names
        arguments = {name: (common | own).get(name, "i32:16") for name in names}
        specs.append(Spec(module, kernel, 90, arguments, {"num_warps": 4, "maxnreg": launch}))
    return specs


def test_compiles_for_the_copy_engine():
    for asked, built in zip(specs := hopper_specs(), cross_compile(specs), strict=True):
        assert built.wgmma
        assert built.registers == 168 and built.shared <= 227 << 10, (asked.kernel, built)
        assert built.stack <= 128, (asked.kernel, built)  # spilled registers


LONG = [0, 1, 517, 128, 300, 64, 1, 1023]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (6, 6), (71, 1)])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_agrees_on_the_device(dim, heads, kv_heads, dtype):
    scale = dim**-0.5
    scorings = [
        Scoring(scale),
        Scoring(scale, causal=False),
        Scoring(scale, window=100),
        Scoring(scale, causal=False, window=70),
        Scoring(scale, softcap=20.0),
        Scoring(scale, slopes=torch.rand(heads, device="cuda")),
        Scoring(scale, causal=False, relative=torch.randn(heads, 257, device="cuda")),
        Scoring(scale, window=100, sinks=torch.randn(heads, device="cuda")),
    ]
    for scoring in scorings if (heads, kv_heads) == (8, 2) else (scorings[0], *scorings[-2:]):
        agree(LONG, heads, kv_heads, dim, scoring, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_pages_on_the_device(dim):
    queries = [5, 0, 64, 200]
    sinks = Scoring(dim**-0.5, sinks=torch.randn(8, device="cuda"))
    plain, window, cap = (Scoring(dim**-0.5, **o) for o in ({}, {"window": 50}, {"softcap": 20.0}))
    for scoring in (plain, window, cap, sinks):
        q, pages = paged(queries, [300, 1, 64, 1000], 8, 2, dim, 16, torch.bfloat16, "cuda")
        starts = boundaries(queries, "cuda")
        got = flash.flash_attention(q, None, None, starts, 200, scoring, pages)
        want = _reference(q.double(), None, None, starts, 200, scoring, wide(pages))
        assert distance(got, want) < 1e-2


@pytest.mark.gpu
def test_caches_beyond_two_billion_elements():
    q, pages = paged([32], [300], 8, 8, 128, 16, torch.bfloat16, "cuda")
    far = 140_000  # pages; times 16 * 8 * 128 elements is beyond 2^31
    keys, values = (torch.empty(far + 19, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    used = pages.table[0, :19].long()
    keys[far:], values[far:] = pages.keys[used], pages.values[used]
    table = (torch.arange(19, dtype=torch.int32, device="cuda") + far)[None]
    starts = boundaries([32], "cuda")
    near = flash.flash_attention(q, None, None, starts, 32, Scoring(0.1), pages)
    moved = Pages(keys, values, table, pages.lengths, 300)
    assert torch.equal(near, flash.flash_attention(q, None, None, starts, 32, Scoring(0.1), moved))


@pytest.mark.gpu
def test_same_gradients_every_time():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 4096, 8, 128, device="cuda").bfloat16())
    starts = boundaries([4096], "cuda")
    out = flash.flash_attention(q, k, v, starts, 4096, Scoring(0.1))
    first = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_inside_torch_compile(small_tiles):
    device = "cuda" if CUDA else "cpu"
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 30, 2, 64, device=device).half())
    starts = boundaries([10, 20], device)

    def attend(q, k, v):
        return flash.flash_attention(q * 2, k, v, starts, 20, Scoring(0.125)) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v), attend(q, k, v)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sum(), (q, k, v)) for t in (got, want)), strict=True):
        assert distance(a, b.double()) < 1e-2
