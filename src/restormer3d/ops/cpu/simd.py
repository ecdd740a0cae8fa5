"""A small language to write vector loops for Numba: fixed-width float32 vectors, emitted as LLVM instructions.

LLVM's own vectorizer keeps to half of the register width and cannot block over rows; the few loops that take
nearly all of the time are therefore unrolled by hand (:mod:`restormer3d.ops.cpu.loops`) in these words.
Vectors wider than the machine's registers are split by LLVM, so the code is right on every processor.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _lanes_and_registers() -> tuple[int, int]:
    """Return float32 lanes per vector register and the number of registers of this machine."""
    if llvm.get_host_cpu_features().get("avx512f"):
        return 16, 32
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 4, 32
    return 8, 16


LANES, REGISTERS = _lanes_and_registers()

_INT = ir.IntType(64)
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_CONTRACT = ("contract",)  # a product and a sum may become one fused instruction; nothing else may change


class Emitter:
    """The words: loads, stores and arithmetic on vectors of ``LANES`` float32 values."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def constant(self, value: float, lanes: int = LANES) -> Any:
        """Return the vector that holds ``value`` in every lane."""
        return ir.Constant(ir.VectorType(_FLOAT, lanes), [ir.Constant(_FLOAT, float(value))] * lanes)

    def at(self, pointer: Any, offset: Any) -> Any:
        """Return ``pointer + offset``, in elements."""
        return self.builder.gep(pointer, [_INT(offset) if isinstance(offset, int) else offset])

    def plus(self, a: Any, b: Any) -> Any:
        """Return the sum of two integers."""
        return self.builder.add(a, _INT(b) if isinstance(b, int) else b)

    def times(self, a: Any, b: Any) -> Any:
        """Return the product of two integers."""
        return self.builder.mul(a, _INT(b) if isinstance(b, int) else b)

    def multiple(self, a: Any, step: int) -> Any:
        """Round an integer down to a multiple of ``step``."""
        return self.times(self.builder.udiv(a, _INT(step)), step)

    def load(self, pointer: Any, lanes: int = LANES) -> Any:
        """Read successive floats."""
        kind = ir.VectorType(_FLOAT, lanes).as_pointer()
        return self.builder.load(self.builder.bitcast(pointer, kind), align=4)

    def store(self, value: Any, pointer: Any) -> None:
        """Write a vector's lanes to successive floats."""
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer()), align=4)

    def prefetch(self, pointer: Any) -> None:
        """Ask for the cache line at ``pointer``; any address is allowed."""
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = self.builder.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        self.builder.call(function, [self.builder.bitcast(pointer, byte), word(0), word(3), word(1)])

    def splat(self, scalar: Any, kind: Any = _VECTOR) -> Any:
        """Return the vector that holds ``scalar`` in every lane."""
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def broadcast(self, pointer: Any) -> Any:
        """Read one float into every lane."""
        return self.splat(self.builder.load(pointer, align=4))

    def add(self, a: Any, b: Any) -> Any:
        """Return ``a + b``."""
        return self.builder.fadd(a, b, flags=_CONTRACT)

    def subtract(self, a: Any, b: Any) -> Any:
        """Return ``a - b``."""
        return self.builder.fsub(a, b, flags=_CONTRACT)

    def multiply(self, a: Any, b: Any) -> Any:
        """Return ``a * b``."""
        return self.builder.fmul(a, b, flags=_CONTRACT)

    def divide(self, a: Any, b: Any) -> Any:
        """Return ``a / b``."""
        return self.builder.fdiv(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return ``a * b + c``."""
        return self.add(self.multiply(a, b), c)

    def reciprocal(self, count: Any) -> Any:
        """Return ``1 / count`` of an integer, in every lane."""
        return self.splat(self.builder.fdiv(_FLOAT(1.0), self.builder.sitofp(count, _FLOAT)))

    def square_root(self, a: Any) -> Any:
        """Return the square root."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR])
        function = self.builder.module.declare_intrinsic(f"llvm.sqrt.v{LANES}f32", fnty=kind)
        return self.builder.call(function, [a])

    def clamp(self, a: Any, limit: float) -> Any:
        """Return ``a`` limited to -limit..limit."""
        high, low = self.constant(limit), self.constant(-limit)
        a = self.builder.select(self.builder.fcmp_ordered("<", a, high), a, high)
        return self.builder.select(self.builder.fcmp_ordered(">", a, low), a, low)

    def first_lanes(self, count: Any, a: Any, b: Any) -> Any:
        """Return the first ``count`` lanes of a, the others of b."""
        kind = ir.VectorType(_INT, LANES)
        lane = ir.Constant(kind, list(range(LANES)))
        return self.builder.select(self.builder.icmp_signed("<", lane, self.splat(count, kind)), a, b)

    def polynomial(self, u: Any, coefficients: Sequence[float]) -> Any:
        """Return the sum of ``coefficients[i] * u**i``."""
        result = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            result = self.fma(result, u, self.constant(coefficient))
        return result

    def interleave(self, a: Any, b: Any, width: int) -> tuple[Any, Any]:
        """Exchange the off-diagonal blocks of ``width`` lanes between two vectors: a step of a transposition."""
        index = ir.VectorType(ir.IntType(32), LANES)
        low = [i if not i & width else LANES + i - width for i in range(LANES)]
        high = [i + width if not i & width else LANES + i for i in range(LANES)]
        shuffle = self.builder.shuffle_vector
        return shuffle(a, b, ir.Constant(index, low)), shuffle(a, b, ir.Constant(index, high))

    def variable(self, value: Any) -> Any:
        """Return a slot that loops may change; LLVM keeps it in a register."""
        slot = cgutils.alloca_once(self.builder, value.type)
        self.set(slot, value)
        return slot

    def get(self, slot: Any) -> Any:
        """Read a slot."""
        return self.builder.load(slot)

    def set(self, slot: Any, value: Any) -> None:
        """Write a slot."""
        self.builder.store(value, slot)

    def sum_lanes(self, a: Any) -> Any:
        """Return the sum of a vector's lanes as a vector of one lane."""
        total = self.builder.extract_element(a, ir.IntType(32)(0))
        for lane in range(1, LANES):
            total = self.builder.fadd(total, self.builder.extract_element(a, ir.IntType(32)(lane)))
        return self.builder.insert_element(self.constant(0.0, 1), total, ir.IntType(32)(0))

    def spans(self, count: Any) -> Iterator[tuple[int, Any]]:
        """Emit loops over ``range(count)`` in ever smaller steps; yields the lanes of a step and its first index."""
        start = _INT(0)
        for lanes in (LANES, 4, 1):
            stop = self.multiple(count, lanes)
            with self.loop(stop, start, lanes) as index:
                yield lanes, index
            start = stop

    @contextmanager
    def loop(self, stop: Any, start: Any = None, step: int = 1) -> Iterator[Any]:
        """Emit ``for index in range(start, stop, step)``."""
        first = _INT(0) if start is None else start
        with cgutils.for_range_slice(self.builder, first, stop, _INT(step), intp=_INT) as (index, _):
            yield index


def vector_loop(emit: Callable[..., None]) -> Any:
    """Turn ``emit(e, *arguments)`` into a function for Numba code; arrays arrive as pointers, the rest as int64."""

    def typed(typingctx: Any, *arguments: Any) -> Any:
        kinds = [a if isinstance(a, types.Array) else types.int64 for a in arguments]

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            pointers = [
                context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
                for kind, value in zip(signature.args, values, strict=True)
            ]
            emit(Emitter(builder), *pointers)
            return context.get_dummy_value()

        return types.void(*kinds), codegen

    typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]  # Numba counts the arguments by it
    typed.__name__ = emit.__name__
    return intrinsic(typed)
