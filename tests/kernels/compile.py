"""Compiles kernels for NVIDIA GPUs without one: `cross_compile` gives the resources of each compiled kernel.

Compilation happens in a process of its own, since Triton's interpreter, which the other tests of kernels use,
replaces the compiler in theirs.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One kernel to compile. `arguments` maps each parameter to its type (`"*bf16"`, `"i32"`, `"fp32"`; with
    `:16` behind it where the value is divisible by 16) or, for constexpr parameters and None, to its value
    (a string with `=` before it).
    `arch` is 80, 90 ...; `options` are `num_warps`, `num_stages`, `maxnreg` ..."""

    module: str
    kernel: str
    arch: int
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What a program of a compiled kernel takes: registers a thread, bytes of shared memory, of stack and of
    spilled registers a thread; and whether it uses Hopper's matrix instructions."""

    registers: int
    shared: int
    stack: int
    local: int
    wgmma: bool


def cross_compile(specs: list[Spec], *, processes: int = 1) -> list[Built]:
    """Compile `specs`; raises RuntimeError with the compiler's words if one fails."""
    parts = [specs[i::processes] for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(_in_process, parts))
    return [done[i % processes][i // processes] for i in range(len(specs))]


def _in_process(specs: list[Spec]) -> list[Built]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(spec) for spec in specs]),
        capture_output=True,
        text=True,
        env=env,
    )
    if ran.returncode:
        raise RuntimeError(f"compiling failed:\n{ran.stderr[-6000:]}")
    return [Built(**built) for built in json.loads(ran.stdout.splitlines()[-1])]


def compile_here(spec: Spec):
    """The compiled kernel of `spec`, in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    signature, constants, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = spec.arguments[name]
        if isinstance(value, str) and value.startswith("="):
            signature[name], constants[name] = "constexpr", value[1:]
        elif isinstance(value, str):
            signature[name], _, divisible = value.partition(":") if "<" not in value else (value, "", "")
            if divisible:
                attributes[(at,)] = [["tt.divisibility", int(divisible)]]
        else:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return triton.compile(
        source(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", spec.arch, 32),
        options=spec.options,
    )


def resources(compiled) -> Built:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Built(
        registers=number["REG"],
        shared=compiled.metadata.shared,
        stack=number["STACK"],
        local=number["LOCAL"],
        wgmma="wgmma.mma_async" in compiled.asm["ptx"],
    )


if __name__ == "__main__":
    print(json.dumps([asdict(resources(compile_here(Spec(**spec)))) for spec in json.load(sys.stdin)]))
