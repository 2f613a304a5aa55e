"""Where a computation first leaves the finite numbers: its operations are carried out one by one and looked at.

    first_nonfinite(step, state, batch)
    → {"nan": "sqrt in row_sums (jaxlm/train/losses.py:44), of -1 to 3.2, layer 7 of a scan", "inf": …}

What is written into the program as an infinity, such as a mask's -inf, starts nothing.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PACKAGE = os.sep + "jaxlm" + os.sep
# Operations that are a program of their own. Others with one inside (a reduction, a kernel) are looked at as a whole.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_lin")
CALLS += ("custom_vjp_call", "custom_vjp_call_jaxpr")


class _Done(Exception):
    """A NaN is found; what comes after it is full of them."""


def first_nonfinite(function: Any, *arguments: Any) -> dict[str, str]:
    """The first operation with finite inputs (or, for NaN, at least none that is NaN) and an output that is not.

    Takes the memory of all values that are alive, and some milliseconds an operation: minutes for a small model's step.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    look = _Look()
    with contextlib.suppress(_Done):
        look.run(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), "")
    return look.found


class _Look:
    def __init__(self):
        self.found: dict[str, str] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], where: str) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values |= zip(jaxpr.invars, arguments, strict=True)
        read = lambda x: x.val if isinstance(x, Literal) else values[x]
        last = {x: n for n, eqn in enumerate(jaxpr.eqns) for x in eqn.invars if not isinstance(x, Literal)}
        kept = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
        for number, eqn in enumerate(jaxpr.eqns):
            inputs = [read(x) for x in eqn.invars]
            outputs = self.operation(eqn, inputs, where)
            values |= zip(eqn.outvars, outputs, strict=True)
            for x in eqn.invars:  # memory: what nothing reads any more goes
                if not isinstance(x, Literal) and last[x] == number and x not in kept:
                    values.pop(x, None)
        return [read(x) for x in jaxpr.outvars]

    def operation(self, eqn: Any, inputs: list[Any], where: str) -> list[Any]:
        if eqn.primitive.name == "scan":
            return self.scan(eqn, inputs, where)
        inner = _inner(eqn)
        if inner is not None:
            return self.run(inner.jaxpr, inner.consts, inputs[len(inputs) - len(inner.jaxpr.invars) :], where)
        made: Any = eqn.primitive.get_bind_params(eqn.params)
        functions, parameters = made if isinstance(made, tuple) else ((), made)  # before and since jax 0.10
        outputs = eqn.primitive.bind(*functions, *inputs, **parameters)
        outputs = list(outputs) if eqn.primitive.multiple_results else [outputs]
        self.look(eqn, inputs, outputs, where)
        return outputs

    def scan(self, eqn: Any, inputs: list[Any], where: str) -> list[Any]:
        """Turn by turn, so that the turn (which layer, which piece of the batch) is known."""
        p = eqn.params
        fixed, carry = inputs[: p["num_consts"]], inputs[p["num_consts"] : p["num_consts"] + p["num_carry"]]
        rows, made = inputs[p["num_consts"] + p["num_carry"] :], []
        turns = range(p["length"])
        for turn in reversed(turns) if p["reverse"] else turns:
            given = [*fixed, *carry, *(x[turn] for x in rows)]
            out = self.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, given, f"{where}, turn {turn} of {p['length']}")
            carry = out[: p["num_carry"]]
            made.append(out[p["num_carry"] :])
        made = made[::-1] if p["reverse"] else made
        return [*carry, *(jax.numpy.stack(column) for column in zip(*made, strict=True))]

    def look(self, eqn: Any, inputs: list[Any], outputs: list[Any], where: str) -> None:
        kinds = {"nan": np.isnan} if "inf" in self.found else {"inf": np.isinf, "nan": np.isnan}
        for kind, test in kinds.items():
            bad = any(test(x).any() for x in map(_numbers, outputs))
            given = any((test(x).any() if kind == "nan" else not np.isfinite(x).all()) for x in map(_numbers, inputs))
            if bad and not given:
                self.found[kind] = f"{eqn.primitive.name} in {_place(eqn)}, of {_range(inputs)}{where}"
                if kind == "nan":
                    raise _Done


def _inner(eqn: Any) -> ClosedJaxpr | None:
    """The program inside a call, a checkpointed part, or a function with its own derivative."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if eqn.primitive.name in CALLS else ():
        inner = eqn.params.get(name)
        if isinstance(inner, ClosedJaxpr):
            return inner
        if isinstance(inner, Jaxpr):
            return ClosedJaxpr(inner, ())
    return None


def _numbers(x: Any) -> np.ndarray:
    """As float32, whole numbers as nothing at all."""
    if not jax.numpy.issubdtype(jax.numpy.result_type(x), jax.numpy.inexact):
        return np.zeros(0)
    return np.asarray(x).astype(np.float32)


def _place(eqn: Any) -> str:
    """The innermost line that this operation comes from and that is no other library's."""
    for frame in eqn.source_info.traceback.frames if eqn.source_info.traceback else ():
        name = frame.file_name
        if PACKAGE in name or f"{os.sep}site-packages{os.sep}" not in name:
            short = name[name.rindex(PACKAGE) + 1 :] if PACKAGE in name else name
            return f"{frame.function_name.split('.')[-1]} ({short}:{frame.line_num})"
    return "an unknown place"


def _range(inputs: Sequence[Any]) -> str:
    ranges = [f"{x.min():.4g} to {x.max():.4g}" for x in map(_numbers, inputs) if x.size]
    return " and ".join(ranges) or "whole numbers"
