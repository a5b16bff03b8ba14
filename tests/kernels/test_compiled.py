"""Every kernel that is launched is compiled by a test, those without a test of their own here; and why
kernels can't run on a device, or a cache does not lie there."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import taut.kernels
from taut.engine import resident
from taut.errors import RequestError
from taut.kernels import dispatch, flash
from taut.kernels.attention import Scoring
from tests.kernels.compile import Spec, cross_compile
from tests.kernels.variants import variants

KERNELS = Path(taut.kernels.__file__).parent


def launched(module: Path) -> set[str]:
    """The kernels of a module that no other kernel calls."""
    functions = [f for f in ast.parse(module.read_text("utf-8")).body if isinstance(f, ast.FunctionDef)]
    jitted = {f.name: f for f in functions if any(".jit" in ast.unparse(d) for d in f.decorator_list)}
    called = {
        node.func.id
        for function in jitted.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    passed = {  # to `warp_specialize`
        name.id
        for function in jitted.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Tuple)
        for name in node.elts
        if isinstance(name, ast.Name)
    }
    return set(jitted) - called - passed


def test_every_kernel_that_is_launched_is_compiled_by_a_test():
    words = {}
    for file in Path(__file__).parent.glob("test_*.py"):
        nodes = ast.walk(ast.parse(file.read_text("utf-8")))
        words[file.name] = {node.value for node in nodes if isinstance(node, ast.Constant)}
    found = {(file.stem, kernel) for file in KERNELS.glob("*.py") for kernel in launched(file)}
    assert len(found) > 30
    for module, kernel in sorted(found):
        names = {module, f"taut.kernels.{module}"}
        assert any(names & text and kernel in text for text in words.values()), (module, kernel)


def test_no_kernel_is_compiled_again_for_another_batch():
    """But for its constexprs, of which sizes make few: all rows would wait for a second."""
    found = variants()
    for one in found:
        assert not one["differing"] and one["constants"] <= 8, one
    every = {f"{file.stem}.{kernel}" for file in KERNELS.glob("*.py") for kernel in launched(file)}
    assert {one["kernel"] for one in found} == every


def test_compiles_the_parts_of_flash_attentions_backward():
    sums = dict.fromkeys(("OUT", "DO", "DQ", "Q", "K", "V"), "*bf16:16")
    sums |= dict.fromkeys(("LSE", "DELTA", "LSE_TILES", "DELTA_TILES", "d_relative"), "*fp32:16")
    sums |= {"relative": "*bf16:16", "starts": "*i32:16", "key_starts": "*i32:16"}
    sums |= dict.fromkeys(("scale", "softcap", "true_scale"), "fp32")
    sums |= dict.fromkeys(("tokens", "rows", "group", "window", "reach"), "i32")
    flags = dict.fromkeys(("CAUSAL", "WINDOW", "SOFTCAP", "ALIBI"), False) | {"slopes": None}
    flags |= {"RELATIVE": True, "D_RELATIVE": True}  # T5: what Hopper's own kernel does not take
    wide = flash.block_dim(64)
    specs = []
    for kernel, arch, block in (
        ("_delta", 80, 64), ("_delta", 90, 64), ("_statistics", 90, flash.SLOT), ("_backward_dq", 90, None)
    ):  # fmt: skip
        m, n, warps, stages = flash._TILES_HOPPER["dq"][wide] if block is None else (block, 64, 4, 3)
        sizes = flags | {"DIM": 64, "BLOCK_D": wide, "BLOCK_M": m, "BLOCK_N": n}
        names = getattr(flash, kernel).arg_names
        arguments = {name: (sums | sizes).get(name, "i32:16") for name in names}
        options = {"num_warps": warps, "num_stages": stages}
        specs.append(Spec("taut.kernels.flash", kernel, arch, arguments, options))
    for spec, built in zip(specs, cross_compile(specs), strict=True):
        assert built.shared <= (227 << 10 if spec.arch == 90 else 99 << 10), (spec, built)
        assert built.stack <= 256 and built.wgmma == (spec.kernel == "_backward_dq"), (spec, built)


def test_statistics_lie_in_tiles_of_each_row():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths, heads, dim, slot = (5, 0, 130, 128, 1), 2, 24, flash.SLOT
    tokens, rows = sum(lengths), len(lengths)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    out, do = torch.randn(2, tokens, heads, dim, device=device).half()
    lse = torch.randn(heads, tokens, device=device)
    slots = tokens // slot + rows
    tiles = torch.full((2, heads, slots * slot), float("nan"), device=device)
    flash._statistics[(slots, heads)](
        out, do, lse, *tiles, starts, tokens, rows, *out.stride()[:2], *do.stride()[:2],
        DIM=dim, BLOCK_D=flash.block_dim(dim), BLOCK_M=slot,
    )  # fmt: skip
    want = (lse, (out.float() * do.float()).sum(-1).T)
    for row, (begin, length) in enumerate(zip(starts.tolist(), lengths, strict=False)):
        at = (begin // slot + row) * slot
        for got, whole, past in zip(tiles, want, (float("inf"), 0.0), strict=True):
            torch.testing.assert_close(got[:, at : at + length], whole[:, begin : begin + length])
            assert (got[:, at + length : at + -(-length // slot) * slot] == past).all()


# -------------------------------------------------------------------------------------- what can't be had

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU to ask about, of this capability and with this much memory free."""

    def make(capability=(9, 0), free=1 << 30):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, free))
        for name in ("memory_reserved", "memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)

    make()
    return make


def test_a_device_that_no_kernel_runs_on_says_why(gpu, monkeypatch):
    refuses = dispatch.device_refuses.__wrapped__  # without what it remembers
    assert refuses(GPU) is None
    gpu(capability=(7, 5))
    assert refuses(GPU) == "needs compute capability 8.0; this GPU has 7.5"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert refuses(GPU) == "Triton is not installed; it comes with PyTorch's CUDA builds"
    monkeypatch.setenv(dispatch.REFERENCE, "1")
    assert refuses(GPU) == "TAUT_REFERENCE is set"
    assert refuses(torch.device("cpu")) == "TAUT_REFERENCE is set"


def test_attention_that_flash_does_not_take_says_why():
    q = torch.empty(1, 2, 320, dtype=torch.float16)
    assert flash.why_not(q, Scoring(0.1)) == "takes head dims up to 256, not 320"
    assert flash.why_not(q[..., :64].float(), Scoring(0.1)) == "takes float16 and bfloat16, not float32"


def test_a_cache_that_does_not_fit_says_what_does(gpu, monkeypatch):
    from taut.engine.request import Request, SamplingParams

    monkeypatch.setattr(resident, "token_bytes", lambda model: 1 << 20)
    monkeypatch.setattr(resident, "turns_by_length", lambda config: False)
    model = SimpleNamespace(device=GPU, config=None)
    requests = [Request([5] * n, SamplingParams(max_new_tokens=100)) for n in (10, 900)]
    gpu(free=500 << 20)
    message = r"row 1 needs a cache of 1008 tokens \(1008 MiB; prompt 900, new 100.*room for 400 \(400 MiB\)"
    with pytest.raises(RequestError, match=message):
        resident._pages(model, requests, None)
    assert resident._pages(model, requests[:1], None) >= 7
