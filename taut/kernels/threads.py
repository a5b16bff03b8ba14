"""`Kernel`: a compiled CPU kernel, run by all of PyTorch's own threads; `Tape`: many of them in one call."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from taut.kernels.llvm import Builder, Code, assemble, compiled, missing

# Eight bytes each, which is how `compiled` finds them.
_C_TYPES = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "f32": ctypes.c_double}

# A program: how many kernels, into how many shares each is cut, and for each kernel its address, that of its
# arguments, and two counters: of the shares that were taken and of those that are done. Each thread takes the
# next share of a kernel that nobody has taken, until there is none; then it waits for those that others took.
# So a thread that the system doesn't run holds up nobody else.
_RUN = """
declare i32 @sched_yield()
{declaration}

define void @run(ptr %program) {{
entry:
  %count = load i64, ptr %program
  %shares_at = getelementptr i64, ptr %program, i64 1
  %shares = load i64, ptr %shares_at
  %begin = getelementptr i64, ptr %program, i64 2
  br label %next
next:
  %i = phi i64 [0, %entry], [%following, %after]
  %at = phi ptr [%begin, %entry], [%behind, %after]
  %arguments_at = getelementptr i64, ptr %at, i64 1
  %taken_at = getelementptr i64, ptr %at, i64 2
  %done_at = getelementptr i64, ptr %at, i64 3
  %behind = getelementptr i64, ptr %at, i64 4
  %kernel = load ptr, ptr %at
  %arguments = load ptr, ptr %arguments_at
  br label %take
take:
  %share = atomicrmw add ptr %taken_at, i64 1 acq_rel
  %left = icmp ult i64 %share, %shares
  br i1 %left, label %work, label %check
work:
  call void %kernel(ptr %arguments, i64 %share, i64 %shares)
  %before = atomicrmw add ptr %done_at, i64 1 acq_rel
  br label %take
check:
  %turns = phi i64 [0, %take], [%more_turns, %spin]
  %done = load atomic i64, ptr %done_at acquire, align 8
  %all = icmp uge i64 %done, %shares
  br i1 %all, label %after, label %wait
wait:
  %more_turns = add i64 %turns, 1
  %long = icmp ugt i64 %turns, 4096
  br i1 %long, label %give, label %pause
give:
  %ignored = call i32 @sched_yield()
  br label %spin
pause:
  {pause}
  br label %spin
spin:
  br label %check
after:
  %following = add i64 %i, 1
  %more = icmp ult i64 %following, %count
  br i1 %more, label %next, label %end
end:
  ret void
}}
"""

# What a processor is told in a loop that waits.
_PAUSES = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}


@cache
def missing_threads() -> str | None:
    """Why compiled kernels can't run here, or None."""
    if (why := missing()) is not None:
        return why
    # Windows has no table of all symbols, and its OpenMP no such function; nor has that of macOS.
    if os.name != "posix" or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return "this PyTorch has no OpenMP threads that other code can use"
    return None


@cache
def _runner() -> tuple[Callable[[int], None], Callable[[int, int, int, int], None], Code]:
    """`run`, and OpenMP's own way to call it from several threads."""
    library = ctypes.CDLL(None)
    declaration, pause = _PAUSES.get(platform.machine(), ("", ""))
    symbols = {"sched_yield": ctypes.cast(library.sched_yield, ctypes.c_void_p).value}
    code = assemble(_RUN.format(declaration=declaration, pause=pause), "run", symbols)
    alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address)
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return alone, parallel, code


def _run(program: ctypes.Array) -> None:
    """Run a program by as many threads as PyTorch would."""
    alone, parallel, code = _runner()
    if program[1] == 1:
        alone(ctypes.addressof(program))
    else:
        parallel(code.address, ctypes.addressof(program), program[1], 0)


class Kernel:
    """What `write(builder, arguments)` writes, compiled when it is first called. `fields` names the arguments
    with their types: "ptr" (a tensor or None), "i64" or "f32"."""

    def __init__(self, fields: Mapping[str, str], write: Callable[[Builder, SimpleNamespace], None]):
        self._fields, self._write = dict(fields), write
        places = [(name, _C_TYPES[kind]) for name, kind in fields.items()]
        self._arguments = type("Arguments", (ctypes.Structure,), {"_fields_": places})

    @cached_property
    def code(self) -> Code:
        return compiled(self._fields, self._write)

    def __call__(self, *values: Tensor | float | int | None) -> None:
        """Run it on these arguments, in the order of the fields. Tensors are taken by address."""
        arguments = self._arguments(*[v.data_ptr() if isinstance(v, Tensor) else v for v in values])
        _run(_Single(1, torch.get_num_threads(), self.code.address, ctypes.addressof(arguments), 0, 0))
        if (tape := _recording.get()) is not None:
            tape.add(self, arguments, values)


_Single = ctypes.c_int64 * 6


class Tape:
    """Calls of kernels, in order, to be run again on the same tensors by as many threads as there were."""

    def __init__(self) -> None:
        self._kept: list[Any] = []  # code, arguments and the tensors in them
        self._program = [0, torch.get_num_threads()]

    def __len__(self) -> int:
        return self._program[0]

    def add(self, kernel: Kernel, arguments: ctypes.Structure, values: tuple[Any, ...]) -> None:
        self._kept.append((kernel, arguments, values))
        self._program += [kernel.code.address, ctypes.addressof(arguments), 0, 0]
        self._program[0] += 1

    def play(self) -> None:
        _run(type(self._fresh).from_buffer_copy(self._fresh))

    @cached_property
    def _fresh(self) -> ctypes.Array:
        """The program with its counters at zero."""
        return (ctypes.c_int64 * len(self._program))(*self._program)


_recording: ContextVar[Tape | None] = ContextVar("taut_tape", default=None)


@contextmanager
def recording(tape: Tape) -> Iterator[Tape]:
    """Every kernel that runs inside the block is added to `tape`."""
    token = _recording.set(tape)
    try:
        yield tape
    finally:
        _recording.reset(token)
