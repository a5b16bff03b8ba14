"""Products of up to 64 rows with 4- and 8-bit weights, on tensor cores, in Gluon: as fast as codes are read.

A warp multiplies a few times 16 rows of the weight: each thread loads codes and turns them, in registers,
into the operands that the tensor cores want of it, so no weight passes through shared memory. For that, a
thread takes 16 neighbours of a row where the instruction means other inputs; x is read in the same order, and
a sum doesn't depend on it.

4-bit codes are turned in two ways, each bound by a pipe of its own: permutations of bytes, and a table in
shared memory that has a pair of values for each byte and lane, so that no two lanes meet in a bank. Beside
16 rows or fewer the table is faster, or both at once; with it, loads stay where they are written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.kernels.act_triton import activate
from taut.kernels.device import launch_options, multiprocessors, workspace
from taut.kernels.packed import Scales

MAX_ROWS = 64
STEP = gl.constexpr(64)  # inputs that a warp multiplies at a time: 16 a thread


# ------------------------------------------------------------------------------------- instructions, as PTX


@cache
def tables4(values: tuple[float, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], str]:
    """What turns eight codes, `$4`, into four pairs of neighbours of the 16 `values` in `dtype`, `$0 .. $3`:
    six words to keep in registers, and PTX that finds them in `$5 .. $10`.

    A byte permutation looks up four codes at once among eight bytes; two of them and a third that picks by
    the code's highest bit make a table of 16, and two such planes the two bytes of each value. The first
    code of a byte is its high half. A product with a power of two shifts on the pipe of the multipliers, and
    leaves that of the permutations, the narrow one, to them.
    """
    raw = torch.tensor(values).to(dtype).view(torch.int16).tolist()
    held, inside = [], []
    for shift in (0, 8):
        a, b, c, d = struct.unpack("4i", bytes(half >> shift & 255 for half in raw))
        held += [a, c]
        inside += [b, d]
    lines = ["and.b32 s, $4, 0x77777777;", "mul.hi.u32 t, $4, $9;"]
    lines += ["lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;"]  # (t & a) | b
    for first, second in (("$0", "$1"), ("$2", "$3")):
        for plane, at in (("l", 0), ("h", 2)):
            lines += [f"prmt.b32 {plane}, ${5 + at}, {inside[at]}, s;"]
            lines += [f"prmt.b32 p, ${6 + at}, {inside[at + 1]}, s;", f"prmt.b32 {plane}, {plane}, p, t;"]
        lines += [f"prmt.b32 {first}, l, h, 0x4051;", f"prmt.b32 {second}, l, h, 0x6273;"]
        if first == "$0":
            lines += ["mul.hi.u32 s, s, $10;", "mul.hi.u32 t, t, $10;"]
    return (*held, -(2**31), 2**16), "{ .reg .b32 s, t, p, l, h; " + " ".join(lines) + " }"


@cache
def pairs4(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """What each byte of two codes stands for, the first in its high half: int32 `[256]`, pairs in `dtype`."""
    codes = torch.arange(256)
    return torch.tensor(values).to(dtype)[torch.stack((codes >> 4, codes & 15), 1)].view(torch.int32)[:, 0]


@cache
def _lookup(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`pairs4`, then the words that `tables4` says to keep in registers, for each lane: int32 `[448]`."""
    held = torch.tensor(tables4(values, dtype)[0], dtype=torch.int32)
    return torch.cat((pairs4(values, dtype), held.repeat_interleave(32))).to(device)


@constexpr_function
def finder4() -> str:
    """PTX that turns eight codes, `$4`, into four pairs of neighbours, `$0 .. $3`, that lie in shared memory:
    those of a byte at `$5` + 128 times that byte, an address that a product of bytes makes in one
    instruction, on the pipe of the multipliers."""
    lines = [f"dp4a.u32.u32 t, $4, {128 << 8 * i}, $5; ld.shared.b32 ${i}, [t];" for i in range(4)]
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


@cache
def decoder8(dtype: torch.dtype) -> str:
    """PTX that turns `$2`, four signed bytes, into two pairs of neighbours in `dtype`, exactly: each byte
    becomes the low bits of a number whose unit is 1, and what that adds is taken off."""
    if dtype is torch.float16:  # 1024 + (byte ^ 128) - 1152
        lines = ["xor.b32 w, $2, 0x80808080;"]
        for out, picked in (("$0", "0x4140"), ("$1", "0x4342")):
            lines += [f"prmt.b32 p, w, 0x64646464, {picked};", f"sub.f16x2 {out}, p, o;"]
        return "{ .reg .b32 w, p, o; mov.b32 o, 0x64806480; " + " ".join(lines) + " }"
    lines = []  # 128 + the low seven bits, less 128 or, where the sign is set, 256
    for out, picked in (("$0", "0x4140"), ("$1", "0x4342")):
        lines += [f"prmt.b32 p, $2, 0x43434343, {picked};"]
        lines += ["and.b32 q, p, 0xFF7FFF7F;", "and.b32 p, p, 0xFF80FF80;"]
        lines += [f"fma.rn.bf16x2 {out}, p, m, q;"]
    return "{ .reg .b32 p, q, m; mov.b32 m, 0xBF80BF80; " + " ".join(lines) + " }"


@cache
def multiplier(dtype: torch.dtype) -> str:
    """PTX of one product of 16 x 16 by 16 x 8, `$0 .. $3 = A ($4 .. $7) B ($8, $9) + C ($10 .. $13)`."""
    kind = "f16" if dtype is torch.float16 else "bf16"
    operands = "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13}"
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {operands};"


@constexpr_function
def _load(words: int, offset: int, weight: bool) -> str:
    """PTX that loads so many words from a thread's address and an offset. Nobody reads the weight again; x
    and scales are read by other warps too."""
    kind = "ld.global.L1::no_allocate.L2::128B" if weight else "ld.global"
    outputs = ", ".join(f"${i}" for i in range(words))
    return f"{kind}.v{words}.b32 {{{outputs}}}, [${words} + {offset}];"


@gluon.jit
def _two_words(address, ASM: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASM, "=r,=r,l", [address], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _four_words(address, ASM: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,l", [address], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _decode4(word, held, ASM: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r",
        [word, held[0], held[1], held[2], held[3], held[4], held[5]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _find4(word, place):
    return gl.inline_asm_elementwise(
        finder4(), "=&r,=&r,=&r,=&r,r,r", [word, place],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _place(lane):
    """Where shared memory begins, for each lane (or thread) a word further on."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; mad.lo.u32 $0, $1, 4, $0;",
        "=&r,r", [lane], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@constexpr_function
def _store(row: int, threads: int) -> str:
    """PTX that stores one word of each of so many threads in a row of shared memory."""
    return f"st.shared.b32 [$1 + {4 * row * threads}], $2; mov.u32 $0, $1;"


@gluon.jit
def _keep(place, value, ASM: gl.constexpr):
    """Stores as `ASM` says: without the barrier that would stand before each store of a slice."""
    gl.inline_asm_elementwise(ASM, "=r,r,f", [place, value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _hold(lane):
    """Keeps loads where they are written: the assembler moves none across it. It would let them wait until
    nothing else is left to do."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _decode8(word, ASM: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASM, "=&r,=&r,r", [word], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def _multiply(a, b, c, ASM: gl.constexpr):
    return gl.inline_asm_elementwise(
        ASM, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- the kernel


@gluon.jit
def _codes(bases, at, BITS: gl.constexpr, TILES: gl.constexpr, PLACE: gl.constexpr):
    """The codes of one step: for each of the rows a thread works on, two words of eight, or four of four."""
    found = ()
    for i in gl.static_range(2 * TILES):
        if BITS == 4:
            found += (_two_words(bases[i] + at, _load(2, 4 * STEP // 8 * PLACE, True)),)
        else:
            found += (_four_words(bases[i] + at, _load(4, STEP * PLACE, True)),)
    return found


@gluon.jit
def _of_x(address, PLACE: gl.constexpr):
    """Sixteen neighbours of a row of x, as pairs."""
    first = _four_words(address, _load(4, 2 * STEP * PLACE, False))
    return first + _four_words(address, _load(4, 2 * STEP * PLACE + 16, False))


@gluon.jit
def _scales_ahead(
    scales, nested, offset, at, step, BLOCK: gl.constexpr, DOUBLE: gl.constexpr, AHEAD: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """What `_scales` makes scales of: of a row, whose first block is `at`, in the steps from `step` on."""
    found = ()
    if WHOLE and BLOCK == 64 and AHEAD > 1:  # neighbours, in one load
        at += step
        if DOUBLE:
            if AHEAD == 4:
                found = (gl.load((scales + at).to(gl.pointer_type(gl.uint32))),)
            else:
                found = (gl.load((scales + at).to(gl.pointer_type(gl.uint16))),)
            found += (gl.load(nested + at // 256), gl.load(offset + at // 256))
        elif AHEAD == 4:
            found = _four_words((scales + at).to(gl.int64), _load(4, 0, False))
        else:
            found = _two_words((scales + at).to(gl.int64), _load(2, 0, False))
    else:
        EACH: gl.constexpr = 3 if DOUBLE else 1
        # Runs begin where blocks do, or inside one that holds them whole.
        ALIGNED: gl.constexpr = WHOLE and (BLOCK & (BLOCK - 1)) == 0
        for i in gl.static_range(AHEAD):
            block = at + (step + i) * STEP // BLOCK
            if ALIGNED and i * STEP % BLOCK != 0:
                found += found[EACH * (i - 1) : EACH * i]
            elif DOUBLE:
                found += (gl.load(scales + block),)
                found += (gl.load(nested + block // 256), gl.load(offset + block // 256))
            else:
                found += (gl.load(scales + block).to(gl.int32, bitcast=True),)
    return found


@gluon.jit
def _scales(
    loaded, table, real, BLOCK: gl.constexpr, DOUBLE: gl.constexpr, AHEAD: gl.constexpr, WHOLE: gl.constexpr
):
    """float32 scales, 0 where not `real`."""
    found = ()
    for i in gl.static_range(AHEAD):
        if not DOUBLE:
            scale = loaded[i].to(gl.float32, bitcast=True)
        elif WHOLE and BLOCK == 64 and AHEAD > 1:
            code = loaded[0].to(gl.int32) >> (8 * i) & 255
            scale = gl.load(table + code) * loaded[1] + loaded[2]
        else:
            scale = gl.load(table + loaded[3 * i].to(gl.int32)) * loaded[3 * i + 1] + loaded[3 * i + 2]
        found += (gl.where(real, scale, 0.0),)
    return found


@gluon.jit
def _where(real, words):
    """The words, zeros where not `real`."""
    kept = ()
    for i in gl.static_range(8):
        kept += (gl.where(real, words[i], 0),)
    return kept


@gluon.jit
def _pairs(word, at: gl.constexpr, held, place, DECODER: gl.constexpr, LOOKUPS: gl.constexpr):
    """Four pairs of neighbours, for eight codes that are the `at`-th of a thread's four words."""
    return _find4(word, place) if at < LOOKUPS else _decode4(word, held, DECODER)


@gluon.jit
def _operands(
    codes, held, place, tile: gl.constexpr, BITS: gl.constexpr, DECODER: gl.constexpr, LOOKUPS: gl.constexpr
):
    """What the tensor core wants of this thread in the four instructions of a step, for one tile."""
    low = codes[2 * tile]
    high = codes[2 * tile + 1]
    if BITS == 4:
        a = _pairs(low[0], 0, held, place, DECODER, LOOKUPS)
        b = _pairs(high[0], 2, held, place, DECODER, LOOKUPS)
        c = _pairs(low[1], 1, held, place, DECODER, LOOKUPS)
        d = _pairs(high[1], 3, held, place, DECODER, LOOKUPS)
        operands = (
            (a[0], b[0], a[1], b[1]),
            (a[2], b[2], a[3], b[3]),
            (c[0], d[0], c[1], d[1]),
            (c[2], d[2], c[3], d[3]),
        )
    else:
        operands = ()
        for i in gl.static_range(4):
            a = _decode8(low[i], DECODER)
            b = _decode8(high[i], DECODER)
            operands += ((a[0], b[0], a[1], b[1]),)
    return operands


@gluon.jit
def _finish(
    total, up, n, m, scales, bias, residual, out, rows, outputs,
    BITS: gl.constexpr, BIAS: gl.constexpr, ACT: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Scale, bias, activation, residual and store of the sums of outputs `n` and rows `m`."""
    there = (n < outputs) & (m < rows)
    if BITS == 8:
        total = total * (gl.load(scales + n, mask=there, other=0.0) * (1 / 127))
    if BIAS:
        total += gl.load(bias + n, mask=there, other=0.0).to(gl.float32)
    if ACT != "":
        if BITS == 8:
            up = up * (gl.load(scales + outputs + n, mask=there, other=0.0) * (1 / 127))
        if BIAS:
            up += gl.load(bias + outputs + n, mask=there, other=0.0).to(gl.float32)
        total = activate(total, ACT) * up
    place = m.to(gl.int64) * outputs + n
    if RESIDUAL:
        total += gl.load(residual + place, mask=there, other=0.0).to(gl.float32)
    gl.store(out + place, total.to(out.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=["rows", "steps"])
def _product(
    x, codes, lookup, scales, table, nested, offset, bias, residual, out, parts, counters, rows, outputs,
    inputs, steps,
    BITS: gl.constexpr, BLOCK: gl.constexpr, DOUBLE: gl.constexpr, BIAS: gl.constexpr, ACT: gl.constexpr,
    RESIDUAL: gl.constexpr, DECODER: gl.constexpr, MULTIPLIER: gl.constexpr, COLUMNS: gl.constexpr,
    TILES: gl.constexpr, AHEAD: gl.constexpr, WHOLE: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr,
    SPLITS: gl.constexpr, LOOKUPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """`COLUMNS` eights of rows of x against `TILES` sixteens of the weight's rows a warp (with ACT: of its
    gate half and of its up half), `WN` warps side by side and `WK` that share the inputs, as `SPLITS`
    programs do; each of those takes `steps` steps. `AHEAD` steps of codes are in flight; WHOLE: that divides
    all there are. Of four words of 4-bit codes, `LOOKUPS` are turned into values by a table in shared memory,
    the others by permutations; with a table, loads are asked for as early as they are written here."""
    gl.static_assert(TILES == 2 or ACT == "")
    gl.static_assert(BITS == 4 or LOOKUPS == 0)
    THREADS: gl.constexpr = 32 * WN * WK
    L: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [1, WN * WK], [1, 0]))
    thread = gl.arange(0, THREADS, L)
    lane = thread % 32
    warp = thread // 32
    quad = lane // 4  # the row of a tile, and the row of x, that this thread loads
    part = lane % 4  # and which of the four sixteens of a step
    HALVES: gl.constexpr = 1 if ACT == "" else 2
    SPAN: gl.constexpr = 16 * TILES // HALVES  # outputs of a warp
    first = (gl.program_id(0) * WN + warp // WK) * SPAN

    row_bytes = inputs * BITS // 8
    row_blocks = inputs // BLOCK
    bases = ()  # addresses of the thread's share of the first step, row by row
    blocks = ()  # and the numbers of the rows' first blocks
    for i in gl.static_range(2 * TILES):
        row = first + quad + 8 * i if HALVES == 1 else first + quad + 8 * (i % 2)
        row = gl.minimum(row, outputs - 1).to(gl.int64)
        if HALVES == 2 and i >= 2:
            row += outputs
        bases += ((codes + row * row_bytes + part * (2 * BITS)).to(gl.int64),)
        blocks += (row * row_blocks,)
    # Steps come in runs of AHEAD: the codes of the next run are loaded while one is multiplied. A run that
    # would reach past the last step (only the very last can, and not if WHOLE) begins earlier, and steps that
    # have had their turn count nothing.
    many = inputs // STEP
    begin = (gl.program_id(1) * WK + warp % WK) * steps
    end = gl.minimum(begin + steps, many)
    run = gl.minimum(begin, many - AHEAD)
    # Codes are known before the kernel ahead has ended; x is not.
    ahead = ()
    for i in gl.static_range(AHEAD):
        ahead += (_codes(bases, run.to(gl.int64) * (STEP * BITS // 8), BITS, TILES, i),)
    scales_ahead = ()
    if BITS == 4:
        for i in gl.static_range(2 * TILES):
            some_scales = _scales_ahead(scales, nested, offset, blocks[i], run, BLOCK, DOUBLE, AHEAD, WHOLE)
            scales_ahead += (some_scales,)
    # One piece of shared memory, for the pairs of values, then for sums. It is all there is, so it begins
    # where `_place` takes it to begin.
    SUMS: gl.constexpr = 4 * COLUMNS * TILES // HALVES  # a thread's, of each half
    WORDS: gl.constexpr = max(8192 if LOOKUPS else 0, HALVES * SUMS * THREADS)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    memory = gl.allocate_shared_memory(gl.float32, [WORDS // 32, 32], ROWS)
    words = ()
    place = lane
    if LOOKUPS:
        T: gl.constexpr = gl.BlockedLayout([4, 4], [4, 8], [WN * WK, 1], [1, 0])
        byte = gl.arange(0, 256, gl.SliceLayout(1, T))
        bank = gl.arange(0, 32, gl.SliceLayout(0, T))
        pairs = gl.load(lookup + byte)[:, None] + 0 * bank[None, :]
        memory._reinterpret(gl.int32, [256, 32], ROWS).store(pairs)
        gl.thread_barrier()
        place = _place(lane)
    if BITS == 4 and LOOKUPS < 4:
        # Loaded by each lane for itself: what all lanes share is moved to a register anew for each use.
        for i in gl.static_range(6):
            words += (gl.load(lookup + 256 + i * 32 + lane),)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sources = ()
    for i in gl.static_range(COLUMNS):
        row = gl.minimum(quad + 8 * i, rows - 1).to(gl.int64)
        sources += ((x + row * inputs + part * 16).to(gl.int64),)

    # Loads come back in order: x would wait for the codes that were asked for before it. So it is loaded with
    # them, a run ahead, where there are registers for it.
    x_ahead = ()
    if COLUMNS <= 2:
        for i in gl.static_range(AHEAD):
            some_x = ()
            for column in gl.static_range(COLUMNS):
                some_x += (_of_x(sources[column] + run.to(gl.int64) * (2 * STEP), i),)
            x_ahead += (some_x,)
    zero = gl.zeros([THREADS], gl.float32, L)
    nothing = (zero, zero, zero, zero)
    sums = ()
    for _ in gl.static_range(TILES * COLUMNS):
        sums += (nothing,)
    for start in range(0, steps, AHEAD):
        first_step = begin + start
        following = gl.minimum(first_step + AHEAD, many - AHEAD)
        some = first_step < end
        x_at = run.to(gl.int64) * (2 * STEP)
        next_x = following.to(gl.int64) * (2 * STEP)
        factors = ()
        new_scales = ()
        if BITS == 4:
            for i in gl.static_range(2 * TILES):
                factors += (_scales(scales_ahead[i], table, some, BLOCK, DOUBLE, AHEAD, WHOLE),)
        codes_at = following.to(gl.int64) * (STEP * BITS // 8)
        for i in gl.static_range(AHEAD):
            real = some if WHOLE else (run + i >= first_step) & (run + i < end)
            now = ahead[i]
            operands = ()
            for tile in gl.static_range(TILES):
                operands += (_operands(now, words, place, tile, BITS, DECODER, LOOKUPS),)
            new = ()
            for column in gl.static_range(COLUMNS):
                v = x_ahead[i][column] if COLUMNS <= 2 else _of_x(sources[column] + x_at, i)
                if BITS == 8 or not WHOLE:
                    v = _where(real, v)
                for tile in gl.static_range(TILES):
                    old = sums[column * TILES + tile]
                    made = nothing if BITS == 4 else old
                    for s in gl.static_range(4):
                        made = _multiply(operands[tile][s], (v[2 * s], v[2 * s + 1]), made, MULTIPLIER)
                    if BITS == 4:
                        low, high = factors[2 * tile][i], factors[2 * tile + 1][i]
                        made = (old[0] + made[0] * low, old[1] + made[1] * low,
                                old[2] + made[2] * high, old[3] + made[3] * high)  # fmt: skip
                    new += (made,)
            sums = new
            ahead = ahead[:i] + (_codes(bases, codes_at, BITS, TILES, i),) + ahead[i + 1 :]  # noqa: RUF005
            if COLUMNS <= 2:
                some_x = ()
                for column in gl.static_range(COLUMNS):
                    some_x += (_of_x(sources[column] + next_x, i),)
                x_ahead = x_ahead[:i] + (some_x,) + x_ahead[i + 1 :]  # noqa: RUF005
            if BITS == 4 and i == AHEAD - 1:
                for j in gl.static_range(2 * TILES):
                    some_scales = _scales_ahead(
                        scales, nested, offset, blocks[j], following, BLOCK, DOUBLE, AHEAD, WHOLE
                    )
                    new_scales += (some_scales,)
            if LOOKUPS:
                _hold(lane)
        run = following
        scales_ahead = new_scales

    # Sums of the warps that shared the inputs are added up, always in the same order: [sums, WN, WK, 32].
    W: gl.constexpr = gl.BlockedLayout([1, 1, WK, 1], [1, 1, 1, 32], [WK, WN, 1, 1], [3, 2, 1, 0])
    S: gl.constexpr = gl.SliceLayout(2, W)
    if LOOKUPS:
        gl.thread_barrier()  # all have read the values they need
    sum_place = _place(thread)
    for tile in gl.static_range(TILES):
        for column in gl.static_range(COLUMNS):
            for i in gl.static_range(4):
                value = sums[column * TILES + tile][i]
                _keep(sum_place, value, _store((tile * COLUMNS + column) * 4 + i, THREADS))
    gl.thread_barrier()
    halves = memory._reinterpret(gl.float32, [HALVES * SUMS, THREADS], ROWS)
    halves = halves.reshape([HALVES * SUMS, WN, WK, 32])
    total = gl.sum(halves.slice(0, SUMS).load(W), 2)  # [SUMS, WN, 32]
    up = total
    if HALVES == 2:
        up = gl.sum(halves.slice(SUMS, SUMS).load(W), 2)
    j = gl.arange(0, SUMS, gl.SliceLayout(1, gl.SliceLayout(2, S)))[:, None, None]
    w = gl.arange(0, WN, gl.SliceLayout(0, gl.SliceLayout(2, S)))[None, :, None]
    at = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, None, :]
    tile = j // (4 * COLUMNS)
    n = (gl.program_id(0) * WN + w) * SPAN + tile * 16 + j % 4 // 2 * 8 + at // 4
    m = j // 4 % COLUMNS * 8 + at % 4 * 2 + j % 2
    if SPLITS == 1:
        _finish(total, up, n, m, scales, bias, residual, out, rows, outputs, BITS, BIAS, ACT, RESIDUAL)
    else:
        SIZE: gl.constexpr = SUMS * WN * 32
        mine = (j * WN + w) * 32 + at
        base = parts + gl.program_id(0) * (SPLITS * HALVES * SIZE)
        gl.store(base + gl.program_id(1) * (HALVES * SIZE) + mine, total)
        if HALVES == 2:
            gl.store(base + gl.program_id(1) * (HALVES * SIZE) + SIZE + mine, up)
        gl.thread_barrier()
        if gl.atomic_add(counters + gl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            gl.store(counters + gl.program_id(0), 0)
            total = gl.zeros([SUMS, WN, 32], gl.float32, S)
            up = total
            for s in gl.static_range(SPLITS):
                total += gl.load(base + s * (HALVES * SIZE) + mine, cache_modifier=".cg")
                if HALVES == 2:
                    up += gl.load(base + s * (HALVES * SIZE) + SIZE + mine, cache_modifier=".cg")
            _finish(total, up, n, m, scales, bias, residual, out, rows, outputs, BITS, BIAS, ACT, RESIDUAL)


@dataclass(frozen=True)
class Cut:
    """How a product is cut up: see `_product`. `lookups` for 4-bit codes alone."""

    tiles: int
    ahead: int
    wn: int
    wk: int
    splits: int
    lookups: int = 0


def cut_of(rows: int, outputs: int, inputs: int, gated: bool, bits: int, device: torch.device) -> Cut:
    """The choice for `rows` rows through a weight of `outputs` (of each half, if gated) by `inputs`."""
    few = triton.cdiv(outputs, 32) < 2 * multiprocessors(device)  # programs, of 32 outputs each
    if rows > 32:
        return Cut(2, 2, 1, 4, 1)
    if rows > 16:  # x takes the registers that hide how long a table takes to answer
        return Cut(2, 1, 1, 8 if few else 2 if gated else 4, 1)
    if bits == 8:
        return Cut(2, 2, 1, 8, 1) if gated else Cut(1, 4, 1, 8, 1)
    ahead = 2 if inputs % 256 else 4  # a last run of fewer steps takes registers
    if gated:
        return Cut(2, ahead, 1, 4, 1, 4) if few else Cut(2, ahead, 2, 2, 1, 4)
    return Cut(1, ahead, 1, 8, 1, 2) if few else Cut(2, ahead, 1, 4, 1, 4)


def refuses(x: Tensor, block: int | None = None) -> str | None:
    """Why `product` can't take `x` `[rows, inputs]`, None if it can; `block` for 4-bit codes."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if not 0 < x.shape[0] <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows, not {x.shape[0]}"
    if x.shape[1] % 64:
        return f"wants inputs divisible by 64, not {x.shape[1]}"
    if block is not None and (block % 64 or x.shape[1] % block):
        return f"wants rows of whole blocks of 64 or more; inputs are {x.shape[1]} in blocks of {block}"
    return None


def product(
    x: Tensor,
    codes: Tensor,
    scales: Scales,
    outputs: int,
    *,
    values: tuple[float, ...] | None = None,
    block: int = 64,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """`residual + glu(x W^T + bias)`, each part only where asked for, for what `refuses` accepts.

    `x` `[rows, inputs]`. `W` `[outputs, inputs]` are 4-bit codes, uint8 `[outputs * inputs / 2]` into the 16
    `values`, the first of a pair in the high half, with a scale for each `block` of them; or, without
    `values`, int8 rows `[outputs, inputs]`, each times its scale / 127. With `act`, weight and bias hold the
    gate half, then the up half. Sums are float32 and rounded once, at the end; the 16 values are rounded to
    x's dtype. No gradients.
    """
    rows, inputs = x.shape
    halved = outputs // 2 if act else outputs
    bits = 8 if values is None else 4
    if values is None:
        lookup, decoder = None, decoder8(x.dtype)
    else:
        lookup, decoder = _lookup(values, x.dtype, x.device), tables4(values, x.dtype)[1]
    cut = cut or cut_of(rows, halved, inputs, act is not None, bits, x.device)
    out = torch.empty(rows, halved, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(triton.cdiv(rows, 8))
    programs = triton.cdiv(halved, cut.wn * (16 * cut.tiles // (2 if act else 1)))
    # A multiple of `ahead` of them for each warp.
    ahead = min(cut.ahead, 1 << (inputs // 64).bit_length() - 1)
    steps = triton.cdiv(inputs, 64 * ahead * cut.wk * cut.splits) * ahead
    memory = None
    if cut.splits > 1:
        memory = workspace(x.device, programs * cut.splits * 128 * columns * cut.tiles * cut.wn, programs)
    _product[(programs, cut.splits)](
        x.contiguous(), codes, lookup, scales.absmax, scales.table, scales.nested, scales.offset, bias,
        None if residual is None else residual.contiguous(), out, memory.parts if memory else None,
        memory.counters if memory else None, rows, halved, inputs,
        steps,
        BITS=bits, BLOCK=block, DOUBLE=scales.table is not None, BIAS=bias is not None, ACT=act or "",
        RESIDUAL=residual is not None,
        DECODER=decoder, MULTIPLIER=multiplier(x.dtype), COLUMNS=columns, TILES=cut.tiles,
        AHEAD=ahead, WHOLE=inputs // 64 % ahead == 0, WN=cut.wn, WK=cut.wk, SPLITS=cut.splits,
        LOOKUPS=cut.lookups, num_warps=cut.wn * cut.wk, **launch_options(x.device),
    )  # fmt: skip
    return out
