"""Kernels for the CPU: LLVM IR written from Python, compiled by llvmlite for the machine that it runs on.

A kernel is a Python function that writes the IR through a `Builder`: values have operators, vectors are
values with several lanes, and what Python computes is a constant. Vectors of 16 lanes are what the machine
has or become several narrower ones, so a kernel is written once for AVX2, AVX-512 and NEON.
"""

from __future__ import annotations

import platform
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType, SimpleNamespace
from typing import Any

LANES = 16
LEAST = (0, 45)  # llvmlite's first release with LLVM 20, whose text the kernels are written in

_NAMES = {"f16": "half", "bf16": "bfloat", "f32": "float", "f64": "double"}
_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Type:
    """A scalar (`lanes` 0) or a vector of `base`: "i1" to "i64", "f16" to "f64", "bf16" or "ptr"."""

    base: str
    lanes: int = 0

    def __str__(self) -> str:
        name = _NAMES.get(self.base, self.base)
        return f"<{self.lanes} x {name}>" if self.lanes else name

    @property
    def is_float(self) -> bool:
        return self.base in _NAMES

    @property
    def mangled(self) -> str:
        """As names of intrinsics spell it."""
        return f"v{self.lanes}{self.base}" if self.lanes else self.base


PTR, BOOL, I64, F32 = Type("ptr"), Type("i1"), Type("i64"), Type("f32")


class Value:
    """Something a kernel computes. Numbers take the other operand's type, and scalars its lanes; integers
    divide and shift as unsigned, and compare as signed."""

    __slots__ = ("b", "name", "type")

    def __init__(self, b: Builder, type: Type, name: str):
        self.b, self.type, self.name = b, type, name

    def __add__(self, other: Any) -> Value:
        return self.b.binary("add", "fadd", self, other)

    def __sub__(self, other: Any) -> Value:
        return self.b.binary("sub", "fsub", self, other)

    def __mul__(self, other: Any) -> Value:
        return self.b.binary("mul", "fmul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.b.binary(None, "fdiv", self, other)

    def __floordiv__(self, other: Any) -> Value:
        return self.b.binary("udiv", None, self, other)

    def __mod__(self, other: Any) -> Value:
        return self.b.binary("urem", None, self, other)

    def __and__(self, other: Any) -> Value:
        return self.b.binary("and", None, self, other)

    def __or__(self, other: Any) -> Value:
        return self.b.binary("or", None, self, other)

    def __xor__(self, other: Any) -> Value:
        return self.b.binary("xor", None, self, other)

    def __lshift__(self, other: Any) -> Value:
        return self.b.binary("shl", None, self, other)

    def __rshift__(self, other: Any) -> Value:
        return self.b.binary("lshr", None, self, other)

    def __invert__(self) -> Value:
        return self ^ -1

    def __radd__(self, other: Any) -> Value:
        return self + other

    def __rmul__(self, other: Any) -> Value:
        return self * other

    def __rsub__(self, other: Any) -> Value:
        return self.b.like(other, self) - self

    def __rtruediv__(self, other: Any) -> Value:
        return self.b.like(other, self) / self

    def __neg__(self) -> Value:
        return 0 - self

    def __lt__(self, other: Any) -> Value:
        return self.b.compare("slt", "olt", self, other)

    def __le__(self, other: Any) -> Value:
        return self.b.compare("sle", "ole", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.b.compare("sgt", "ogt", self, other)

    def __ge__(self, other: Any) -> Value:
        return self.b.compare("sge", "oge", self, other)

    def equals(self, other: Any) -> Value:
        return self.b.compare("eq", "oeq", self, other)


class Var:
    """A value that changes: what a loop carries along."""

    __slots__ = ("b", "place", "type")

    def __init__(self, b: Builder, type: Type, place: Value):
        self.b, self.type, self.place = b, type, place

    @property
    def value(self) -> Value:
        return self.b.emit(self.type, f"load {self.type}, ptr {self.place.name}")

    @value.setter
    def value(self, value: Any) -> None:
        value = self.b.like(value, self.type)
        self.b.line(f"store {self.type} {value.name}, ptr {self.place.name}")


class Builder:
    """Writes the body of one kernel, which each of `threads` threads runs with its own number `thread`."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._places: list[str] = []
        self.declared: dict[str, None] = {}
        self._count = 0
        self.thread, self.threads = Value(self, I64, "%thread"), Value(self, I64, "%threads")

    # ------------------------------------------------------------------------------------ text

    def line(self, text: str) -> None:
        self._lines.append("  " + text)

    def emit(self, type: Type, text: str) -> Value:
        name = self._name("v")
        self.line(f"{name} = {text}")
        return Value(self, type, name)

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"%{kind}{self._count}"

    def body(self) -> str:
        return "\n".join([*self._places, *self._lines])

    # ------------------------------------------------------------------------------------ values

    def const(self, number: float | int, type: Type) -> Value:
        if type.base == "f16":
            text = f"0xH{struct.unpack('<H', struct.pack('<e', number))[0]:04X}"
        elif type.is_float:
            if type.base == "f32":
                number = struct.unpack("<f", struct.pack("<f", number))[0]
            text = f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
        else:
            text = str(int(number))
        if type.lanes:
            each = f"{Type(type.base)} {text}"
            text = f"<{', '.join([each] * type.lanes)}>"
        return Value(self, type, text)

    def vector(self, numbers: Sequence[float], base: str) -> Value:
        """A constant with a number for each lane."""
        each = ", ".join(f"{Type(base)} {self.const(n, Type(base)).name}" for n in numbers)
        return Value(self, Type(base, len(numbers)), f"<{each}>")

    def like(self, value: Any, other: Value | Type) -> Value:
        """`value`, a number or a scalar included, with the type of `other`."""
        type = other.type if isinstance(other, Value) else other
        if not isinstance(value, Value):
            return self.const(value, type)
        return self.splat(value, type.lanes) if type.lanes and not value.type.lanes else value

    def splat(self, value: Value, lanes: int = LANES) -> Value:
        type = Type(value.type.base, lanes)
        one = self.emit(type, f"insertelement {type} poison, {value.type} {value.name}, i32 0")
        return self.shuffle(one, [0] * lanes)

    def binary(self, integer: str | None, real: str | None, a: Value, b: Any) -> Value:
        b = self.like(b, a)
        a = self.like(a, b)
        op = real if a.type.is_float else integer
        if op is None or a.type != b.type:
            raise TypeError(f"{integer or real} of {a.type} and {b.type}")
        return self.emit(a.type, f"{op} {a.type} {a.name}, {b.name}")

    def compare(self, integer: str, real: str, a: Value, b: Any) -> Value:
        b = self.like(b, a)
        op = f"fcmp {real}" if a.type.is_float else f"icmp {integer}"
        return self.emit(Type("i1", a.type.lanes), f"{op} {a.type} {a.name}, {b.name}")

    def select(self, where: Value, a: Any, b: Any) -> Value:
        other = a if isinstance(a, Value) else b
        a, b = self.like(a, other), self.like(b, other)
        return self.emit(a.type, f"select {where.type} {where.name}, {a.type} {a.name}, {b.type} {b.name}")

    def convert(self, value: Value, base: str, signed: bool = False) -> Value:
        """The same number in another type. Integers are unsigned unless `signed`."""
        old, new = value.type, Type(base, value.type.lanes)
        if old == new:
            return value
        if old.is_float and new.is_float:
            op = "fpext" if _BITS[base] > _BITS[old.base] else "fptrunc"
        elif old.is_float:
            op = "fptosi"
        elif new.is_float:
            op = "sitofp" if signed else "uitofp"
        else:
            op = "trunc" if _BITS[base] < _BITS[old.base] else "sext" if signed else "zext"
        return self.emit(new, f"{op} {old} {value.name} to {new}")

    def bits(self, value: Value, type: Type) -> Value:
        """The same bits as another type."""
        return self.emit(type, f"bitcast {value.type} {value.name} to {type}")

    def shuffle(self, value: Value, lanes: Sequence[int], other: Value | None = None) -> Value:
        """These lanes of `value`, and of `other` behind it."""
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        second = "poison" if other is None else other.name
        return self.emit(
            Type(value.type.base, len(lanes)),
            f"shufflevector {value.type} {value.name}, {value.type} {second}, <{len(lanes)} x i32> <{mask}>",
        )

    def intrinsic(self, name: str, type: Type, *values: Value) -> Value:
        """A function of LLVM's, or of the machine's own (`x86...`)."""
        return self.call(f"llvm.{name}", type, *values)

    def call(self, name: str, type: Type | None, *values: Value) -> Value | None:
        """A function of that name: LLVM's, or of the C library."""
        result = "void" if type is None else str(type)
        self.declared[f"declare {result} @{name}({', '.join(str(v.type) for v in values)})"] = None
        text = f"call {result} @{name}({', '.join(f'{v.type} {v.name}' for v in values)})"
        return self.line(text) if type is None else self.emit(type, text)

    def fma(self, a: Value, b: Any, c: Any) -> Value:
        """`a * b + c`, rounded once."""
        b, c = self.like(b, a), self.like(c, a)
        return self.intrinsic(f"fma.{a.type.mangled}", a.type, a, b, c)

    def pairs(self, a: Value, b: Value) -> Value:
        """Products of int16 lanes, those of neighbours added: int32, half as many lanes. In words that LLVM
        knows the machine's own operation by."""
        products = self.convert(a, "i32", signed=True) * self.convert(b, "i32", signed=True)
        lanes = a.type.lanes
        return self.shuffle(products, range(0, lanes, 2)) + self.shuffle(products, range(1, lanes, 2))

    def sqrt(self, value: Value) -> Value:
        return self.intrinsic(f"sqrt.{value.type.mangled}", value.type, value)

    def total(self, value: Value) -> Value:
        """The sum of all lanes."""
        one = Type(value.type.base)
        name = f"llvm.vector.reduce.fadd.{value.type.mangled}"
        self.declared[f"declare {one} @{name}({one}, {value.type})"] = None
        start = self.const(-0.0, one).name
        return self.emit(one, f"call reassoc {one} @{name}({one} {start}, {value.type} {value.name})")

    def largest(self, value: Value) -> Value:
        """The largest lane; any lane, if one of them is NaN."""
        while value.type.lanes > 1:
            half = value.type.lanes // 2
            low, high = self.shuffle(value, range(half)), self.shuffle(value, range(half, 2 * half))
            value = self.select(low > high, low, high)
        return self.lane(value, 0)

    def insert(self, vector: Value, value: Value, index: int) -> Value:
        """`vector` with another value in one lane."""
        return self.emit(
            vector.type,
            f"insertelement {vector.type} {vector.name}, {value.type} {value.name}, i32 {index}",
        )

    def lane(self, value: Value, index: int) -> Value:
        return self.emit(Type(value.type.base), f"extractelement {value.type} {value.name}, i32 {index}")

    # ------------------------------------------------------------------------------------ memory, order

    def at(self, place: Value, index: Any, base: str) -> Value:
        """The address of element `index` of an array of `base`."""
        index = self.like(index, I64)
        return self.emit(PTR, f"getelementptr {Type(base)}, ptr {place.name}, i64 {index.name}")

    def load(self, place: Value, index: Any, type: Type | str) -> Value:
        """Element `index` of an array, or as many from there on as the type has lanes."""
        type = Type(type) if isinstance(type, str) else type
        address = self.at(place, index, type.base)
        return self.emit(type, f"load {type}, ptr {address.name}, align {_bytes(type)}")

    def store(self, value: Value, place: Value, index: Any) -> None:
        address = self.at(place, index, value.type.base)
        self.line(f"store {value.type} {value.name}, ptr {address.name}, align {_bytes(value.type)}")

    def prefetch(self, place: Value, index: Any, base: str) -> None:
        address = self.at(place, index, base)
        # To be read, into the second cache, as data.
        self.call("llvm.prefetch.p0", None, address, *(self.const(n, Type("i32")) for n in (0, 2, 1)))

    def var(self, value: Any, type: Type = F32) -> Var:
        value = self.like(value, value.type if isinstance(value, Value) else type)
        place = self._name("p")
        self._places.append(f"  {place} = alloca {value.type}, align 64")
        var = Var(self, value.type, Value(self, PTR, place))
        var.value = value
        return var

    def array(self, base: str, count: int) -> Value:
        """Memory of this thread's own, for as long as the kernel runs."""
        place = self._name("p")
        self._places.append(f"  {place} = alloca [{count} x {Type(base)}], align 64")
        return Value(self, PTR, place)

    @contextmanager
    def loop(self, begin: Any, end: Any, step: Any = 1) -> Iterator[Value]:
        """`for i in range(begin, end, step)`, all of them i64."""
        begin, end, step = (self.like(v, I64) for v in (begin, end, step))
        head, body, done = (self._name("b") for _ in range(3))
        at = self.var(begin)
        self.line(f"br label {head}")
        self._label(head)
        i = at.value
        more = i < end
        self.line(f"br i1 {more.name}, label {body}, label {done}")
        self._label(body)
        yield i
        at.value = i + step
        self.line(f"br label {head}")
        self._label(done)

    @contextmanager
    def when(self, where: Value) -> Iterator[None]:
        body, done = self._name("b"), self._name("b")
        self.line(f"br i1 {where.name}, label {body}, label {done}")
        self._label(body)
        yield
        self.line(f"br label {done}")
        self._label(done)

    def _label(self, name: str) -> None:
        self._lines.append(f"{name[1:]}:")

    def share(self, count: Value) -> tuple[Value, Value]:
        """The first and the one behind the last of this thread's share of `count` pieces."""
        return count * self.thread // self.threads, count * (self.thread + 1) // self.threads


def _bytes(type: Type) -> int:
    """The alignment that an array of a type promises."""
    return 8 if type.base == "ptr" else max(_BITS[type.base] // 8, 1)


def compiled(fields: Mapping[str, str], write: Callable[[Builder, SimpleNamespace], None]) -> Code:
    """`void (void *arguments, int64 thread, int64 threads)`, whose body `write(builder, a)`
    writes. `fields` are the types of the arguments ("ptr", "i64", "f32"), eight bytes each and in `a` by
    name."""
    b = Builder()
    pointer = Value(b, PTR, "%arguments")
    a = {}
    for index, (name, base) in enumerate(fields.items()):
        place = b.at(pointer, index, "i64")
        stored = Type("f64" if base == "f32" else base)
        a[name] = b.convert(b.emit(stored, f"load {stored}, ptr {place.name}, align 8"), base)
    write(b, SimpleNamespace(**a))
    return assemble(
        "\n".join(
            [
                "define void @kernel(ptr noalias %arguments, i64 %thread, i64 %threads) #0 {",
                b.body(),
                "  ret void",
                "}",
                'attributes #0 = { "min-legal-vector-width"="512" "prefer-vector-width"="512" }',
                *b.declared,
            ]
        ),
        "kernel",
    )


@dataclass(frozen=True)
class Code:
    """A compiled function: it is at `address` for as long as this is alive."""

    address: int
    engine: Any


_lock = threading.Lock()  # LLVM's objects are made one at a time


def assemble(source: str, name: str, symbols: Mapping[str, int] | None = None) -> Code:
    """The function `name` of a module in LLVM's text, compiled for this machine; `symbols` are addresses of
    functions that it calls."""
    import llvmlite.binding as llvm

    with _lock:
        machine = _machine()
        for symbol, address in (symbols or {}).items():
            llvm.add_symbol(symbol, address)
        module = llvm.parse_assembly(source)
        module.verify()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
        passes.getModulePassManager().run(module, passes)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        return Code(engine.get_function_address(name), engine)


@cache
def _initialized() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine() -> Any:
    """A description of this machine; each compiler owns one."""
    import llvmlite.binding as llvm

    _initialized()
    target, (name, features) = llvm.Target.from_default_triple(), processor()
    flags = ",".join(f"{'+' if there else '-'}{feature}" for feature, there in sorted(features.items()))
    return target.create_target_machine(cpu=name, features=flags, opt=3)


@cache
def processor() -> tuple[str, Mapping[str, bool]]:
    """What kernels are compiled for: this processor and its features, by LLVM's names."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features())


def has(feature: str) -> bool:
    """Whether kernels may use a feature of the processor ("avx512f")."""
    return bool(processor()[1].get(feature))


# What vectors of 16 lanes and float16 come down to; older processors would call functions for every number.
_NEEDED: Mapping[str, Sequence[str]] = MappingProxyType({"x86_64": ("avx2", "fma", "f16c"), "aarch64": ()})


@cache
def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if find_spec("llvmlite") is None:
        return "llvmlite is not installed (pip install llvmlite)"
    import llvmlite

    if tuple(map(int, llvmlite.__version__.split(".")[:2])) < LEAST:
        return f"wants llvmlite {LEAST[0]}.{LEAST[1]} or newer; {llvmlite.__version__} is installed"
    machine = platform.machine()
    if machine not in _NEEDED:
        return f"is compiled for {' and '.join(_NEEDED)}; this processor is {machine or 'unknown'}"
    if lacks := [feature for feature in _NEEDED[machine] if not has(feature)]:
        return f"wants a processor with {', '.join(_NEEDED[machine])}; this one lacks {', '.join(lacks)}"
    return None
