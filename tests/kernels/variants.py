"""What Triton would compile for calls of Taut's kernels, without a GPU: launches only note what it tells
compiled kernels apart by, and results stay unwritten.

The calls have a process of their own, since Triton's interpreter, which the other tests of kernels use,
replaces the compiler in theirs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

SIZES = (*range(1, 36), 48, 63, 64, 65, 100, 128, 129, 200, 255, 256, 257, 300, 512, 1000, 1200, 2048)


def variants() -> list[dict]:
    """For each kernel of each case: `constants`, how many variants its constexprs make over all `SIZES`, and
    `differing`, the other arguments that tell apart what these do not."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    if ran.returncode:
        raise RuntimeError(f"calling kernels failed:\n{ran.stderr[-6000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def cases() -> dict[str, Callable[[int], object]]:
    """Calls for `n` tokens, or as many rows; all else is as one model has it. Integers of a batch lie
    anywhere, as views of a buffer do."""
    import torch

    from taut.kernels import (
        act_triton,
        flash,
        flash_hopper,
        flash_hopper_backward,
        gemv_triton,
        int8_triton,
        linear_ce_triton,
        lookup_triton,
        moe_products,
        moe_routing,
        moe_triton,
        norm_triton,
        packed_rows,
        packed_triton,
        padding_triton,
        paged_triton,
        rope_triton,
        sample_triton,
    )
    from taut.kernels.attention import Pages, Scoring
    from taut.kernels.lookup import Lookup
    from taut.kernels.moe_packed import PackedMatrices
    from taut.kernels.packed import Codes, Scales
    from taut.kernels.sample import Sampling

    half, wide = torch.bfloat16, torch.float32
    dim, hidden, heads, kv_heads, head_dim, vocab = 128, 320, 8, 2, 64, 1001
    width = (heads + 2 * kv_heads) * head_dim

    def new(*shape: int, dtype=half, learned=False):
        return torch.zeros(shape, dtype=dtype, requires_grad=learned)

    any_ = Random(0)

    def anywhere(n: int, dtype=torch.int32, fill=0):
        """`[n]`, each time at another address within 16 bytes."""
        at = any_.randrange(4)
        return torch.full((n + 3,), fill, dtype=dtype)[at : at + n]

    def starts(n: int, rows: int):
        found = anywhere(rows + 1)
        found.copy_(torch.linspace(0, n, rows + 1).int())
        return found

    def backward(y) -> None:
        y.sum().backward()

    weight, norm, bias = new(2 * hidden, dim), new(dim), new(dim)
    scoring = Scoring(0.125)
    keys = new(1024, 16, kv_heads, head_dim)

    def paged(n: int, group: int = 4) -> None:
        """Rows of one query each, then a row of as many as the kernel takes, in tables of any width."""
        cache = new(64, 16, kv_heads, head_dim)
        for rows, queries in ((n, 1), (1, n)):
            if queries <= paged_triton.MAX_QUERIES:
                pages = Pages(cache, cache, anywhere(rows * n).view(rows, n), anywhere(rows), 16 * n)
                q = new(rows * queries, group * kv_heads, head_dim)
                paged_triton.paged_attention(q, starts(rows, rows), queries, scoring, pages)

    def attend(n: int, **kinds) -> None:
        """A forward and a backward pass of packed rows."""
        q, k, v = (new(n, h, head_dim, learned=True) for h in (heads, kv_heads, kv_heads))
        found = Scoring(0.125, **{name: make() for name, make in kinds.items()})
        backward(flash.flash_attention(q, k, v, starts(n, 2), n, found))

    def prefill(n: int) -> None:
        rows = 1 + n % 3
        pages = Pages(keys, keys, anywhere(rows * n).view(rows, n), anywhere(rows), 16 * n)
        flash.flash_attention(new(n, heads, head_dim), None, None, starts(n, rows), n, scoring, pages)

    def hopper(n: int) -> None:
        q, k = new(n, heads, head_dim), new(n, kv_heads, head_dim)
        begins, lse = starts(n, 3), new(heads, 128 * (n // 128 + 3), dtype=wide)
        flash_hopper.forward(q, k, k, q, lse, begins, begins, None, 0.1, True, -1, 0.0, n)
        args = (q, k, k, q, lse, lse)
        flash_hopper_backward.dq(*args, q, begins, begins, None, 0.1, 0.1, True, -1)
        parts = new(2, n, kv_heads, head_dim)
        flash_hopper_backward.dkdv(*args, parts, parts, begins, begins, None, 2, 0.1, 0.1, True, -1)

    def hopper_around(n: int) -> None:
        """What `flash` launches around Hopper's kernels."""
        q, lse, rows = new(n, heads, head_dim), new(heads, n, dtype=wide), 3
        slots = n // flash.SLOT + rows
        stats = new(2, heads, slots * flash.SLOT, dtype=wide)
        sizes = {"DIM": head_dim, "BLOCK_D": head_dim}
        flash._statistics[(slots, heads)](
            q, q, lse, *stats, starts(n, rows), n, rows, *q.stride()[:2], *q.stride()[:2], **sizes,
            BLOCK_M=flash.SLOT,
        )  # fmt: skip
        flash._add_sinks[(n, heads)](q, lse, lse, new(heads), n, *q.stride()[:2], **sizes, BLOCK_M=64)

    def rope(n: int) -> None:
        cos, sin = rope_triton.angles(anywhere(n), new(head_dim // 2, dtype=wide), 1.0, half)
        qkv = new(n, width)
        rope_triton.rotate(qkv.unflatten(-1, (-1, head_dim))[:, :heads], cos, sin)
        slots = anywhere(n, torch.int64)
        rope_triton.rotate_and_store(qkv, heads, kv_heads, cos, sin, keys, keys, slots)

    def norms(n: int) -> None:
        norm_triton.add_rms_norm(new(n, dim), new(n, dim), norm, 1e-6)
        norm_triton.rms_norm(new(n, width).unflatten(-1, (-1, head_dim))[:, :heads], new(head_dim), 1e-6)
        backward(norm_triton.layer_norm(new(n, dim, learned=True), norm, bias, 1e-6))

    def sample(n: int) -> None:
        floats, ints = (anywhere(n, wide) for _ in range(3)), [anywhere(n, torch.int64) for _ in range(2)]
        temperature, top_p, min_p = floats
        sample_triton.sample(new(n, vocab), Sampling(temperature, anywhere(n), top_p, min_p, *ints))

    def entering(n: int) -> None:
        tables = (
            Lookup(new(vocab, dim), anywhere(n, torch.int64)),
            Lookup(new(512, dim), anywhere(n), 2),
            Lookup(new(2, dim), None),
        )
        lookup_triton.summed_norm(tables, norm, bias, 1e-6)

    def padding(n: int) -> None:
        mask = anywhere(3 * n, torch.int64, 1).view(3, n)
        padding_triton.places(mask)
        padding_triton.spread(new(n, dim), anywhere(3 * n))

    def loss(n: int) -> None:
        linear_ce_triton.cross_entropy(new(n, vocab), anywhere(n, torch.int64), 1.0, None, -100, True)

    values = tuple(float(v) for v in range(16))
    scales = new(2 * hidden * dim // 64, dtype=wide)
    codes = new(2 * hidden * dim // 2, dtype=torch.uint8)
    double = Scales(codes, new(256, dtype=wide), scales, scales)
    bytes_, each = new(2 * hidden, dim, dtype=torch.int8), new(2 * hidden, dtype=wide)

    def packed(n: int, act: str | None = None) -> None:
        x = new(n, dim)
        if n <= packed_rows.MAX_ROWS:
            packed_rows.product(x, codes, double, 2 * hidden, values=values, act=act)
            packed_rows.product(x, bytes_, Scales(each), 2 * hidden, act=act)
            cut = packed_rows.Cut(2, 2, 1, 4, 2)
            packed_rows.product(x, codes, Scales(scales), 2 * hidden, values=values, act=act, cut=cut)

    def unpacked(n: int) -> None:
        packed_triton.unpack4(codes, values=new(16), scales=double, block=64, shape=bytes_.shape, dtype=half)
        packed_triton.unpack8(bytes_, each, half)

    def products(n: int) -> None:
        if n <= 32:
            gemv_triton.run(new(n, dim), weight, None, norm, 1e-6, 0.0, "silu", None, half)

    def mixture(n: int, held=None) -> None:
        experts, chosen = 8, 2
        moe_routing.route(new(n, experts, dtype=wide), chosen, True)
        numbers = torch.zeros(n, chosen, dtype=torch.int32)
        shares = new(n, chosen, dtype=wide)
        moe_triton.mixture(new(n, dim), shares, numbers, *held, "silu", residual=new(n, dim))

    def learned_mixture(n: int) -> None:
        held = [moe_products.DenseMatrices(new(*m.shape, learned=True), None) for m in dense]
        numbers = torch.zeros(n, 2, dtype=torch.int32)
        shares = new(n, 2, dtype=wide, learned=True)
        backward(moe_triton.mixture(new(n, dim, learned=True), shares, numbers, *held, "silu"))

    shapes = (8, 2 * hidden, dim), (8, dim, hidden)
    dense = [moe_products.DenseMatrices(new(*shape), None) for shape in shapes]
    four = [
        PackedMatrices(
            Codes(codes.new_zeros(a * b * c // 2), Scales(scales.new_zeros(a * b * c // 64)), values),
            None, (a, b, c), None,
        )
        for a, b, c in shapes
    ]  # fmt: skip
    return {
        "norm": norms,
        "gated activation": lambda n: backward(act_triton.glu(new(n, 2 * hidden, learned=True), "silu")),
        "rope": rope,
        "paged": paged,
        "paged, many heads share a key head": lambda n: paged(n, 35),
        "attention": attend,
        "attention, relative": lambda n: attend(n, relative=lambda: new(heads, 2 * n + 1, learned=True)),
        "prefill": prefill,
        "hopper": hopper,
        "around hopper": hopper_around,
        "few rows": products,
        "packed": packed,
        "packed, gated": lambda n: packed(n, "silu"),
        "unpacked": unpacked,
        "int8": lambda n: int8_triton.product(new(n, dim), bytes_, each, 6.0),
        "mixture": lambda n: mixture(n, dense),
        "mixture, 4-bit": lambda n: mixture(n, four),
        "mixture, learned": learned_mixture,
        "sample": sample,
        "lookup": entering,
        "padding": padding,
        "loss": loss,
    }


def observe() -> list[dict]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    launches: list[tuple[JITFunction, list, dict]] = []

    def note(self, *args, grid, warmup, **kwargs) -> None:
        if not hasattr(self, "bind"):
            self.bind = create_function_from_signature(self.signature, self.params, backend)
        _, found, options = self.bind(*args, **kwargs)
        launches.append((self, found, options))

    JITFunction.run = note
    found = []
    for case, call in cases().items():
        # For each kernel, and which of its launches in a call it is: by constants, what else there was.
        seen: dict[tuple, dict[tuple, dict[str, set]]] = {}
        for n in SIZES:
            launches.clear()
            call(n)
            turns: dict[str, int] = defaultdict(int)
            for kernel, arguments, options in launches:
                name = f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"
                turns[name] += 1
                fixed, free = [str(options)], {}
                for parameter, (kind, value) in zip(kernel.params, arguments, strict=True):
                    if parameter.is_constexpr or (value is None and kind == "constexpr"):
                        fixed.append(str(value))
                    else:
                        pointer = str(kind).startswith("*")
                        fixed.append(str(kind) if pointer else "")
                        free[parameter.name] = str(value if pointer else (kind, value))
                of = seen.setdefault((name, turns[name]), {}).setdefault(tuple(fixed), defaultdict(set))
                for argument, value in free.items():
                    of[argument].add(value)
        for (name, turn), variants in seen.items():
            differing = {a: sorted(v) for of in variants.values() for a, v in of.items() if len(v) > 1}
            found.append({"case": case, "kernel": name, "turn": turn})
            found[-1] |= {"constants": len(variants), "differing": differing}
    return found


if __name__ == "__main__":
    print(json.dumps(observe()))
