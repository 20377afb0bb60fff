"""Compile Triton kernels ahead of time, for GPUs that are not here: run in a process without TRITON_INTERPRET.

    python -m tests.triton_aot --arch 90 [--every]

Each launcher runs on the sample inputs under `pyml.triton_kernels.record`, which collects its launches instead of
running them; then every launch that differs in anything the compiler sees is compiled. One JSON line a variant.
"""

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
from typing import Any

import pyml.triton_kernels
import torch
import triton
from pyml.triton_kernels import FP32_DOTS, Launch, record
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyml.ops import OPS, Op
from tests.cases import DTYPES, Sample, arguments, samples, schema_arguments

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


def jit_functions() -> dict[str, Any]:
    """Every `@triton.jit` function of the package by its full name."""
    found = {}
    for info in pkgutil.iter_modules(pyml.triton_kernels.__path__, "pyml.triton_kernels."):
        for name, value in inspect.getmembers(importlib.import_module(info.name)):
            if isinstance(value, triton.JITFunction) and value.fn.__module__ == info.name:
                found[f"{info.name}.{name}"] = value
    return found


def source_of(launch: Launch) -> tuple[ASTSource, str]:
    """What Triton would compile for this launch, with the specialisation that it does on a GPU; and a key of it."""
    signature, constants, hints = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = ("i32" if -(2**31) <= value < 2**31 else "i64"), special and value % 16 == 0
        if aligned:
            hints[(position,)] = [["tt.divisibility", 16]]
    key = repr((launch.kernel.fn.__qualname__, signature, constants, sorted(hints), sorted(launch.options.items())))
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=hints), key


def launches(op: Op, sample: Sample, dtype: torch.dtype, arch: int) -> list[Launch]:
    """What the launchers of one op launch for one sample, forward and backward."""
    module = importlib.import_module(f"pyml.triton_kernels.{op.family}")
    values = schema_arguments(op, arguments(op, sample, dtype, "cpu", grad=False))
    with record(arch) as recorded:
        outputs = getattr(module, f"{op.name}_fwd")(*values)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if op.gradients:
            mask = [values[op.arguments.index(name)] is not None for name in op.gradients]
            kept = [outputs[i] for i in op.saved or ()]
            upstream = [torch.zeros_like(t) for t in outputs[: op.outputs]]
            getattr(module, f"{op.name}_bwd")(*upstream, *values, *kept, mask)
    return recorded


def plan(every: bool) -> list[tuple[Op, Sample, torch.dtype, str]]:
    """Samples, each with a dtype and a kind of float32 dot: enough for every kernel in all of them, or every sample."""
    kinds = [(d, "ieee") for d in DTYPES] + [(torch.float32, dot) for dot in FP32_DOTS if dot != "ieee"]
    chosen = []
    for op in OPS.values():
        if op.has_triton:
            usable = [s for s in samples(op) if not s.empty]
            # A different sample for each kind, so that many orders, bases and extrapolations are seen too.
            some = usable if every else [usable[i * len(usable) // len(kinds)] for i in range(len(kinds))]
            chosen += [(op, s, *kinds[i % len(kinds)]) for i, s in enumerate(some)]
    return chosen


VARIANTS: list[tuple[ASTSource, Launch, int]] = []


def compile_variant(place: int) -> dict[str, Any]:
    source, launch, arch = VARIANTS[place]
    extra = launch.options | {"enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=extra)
    kernel = f"{launch.kernel.fn.__module__}.{launch.kernel.fn.__qualname__}"
    kinds = "/".join(v[1:] for v in source.signature.values() if v.startswith("*"))
    sizes = {"shared": compiled.metadata.shared, "cubin": len(compiled.asm["cubin"])}
    return {"kernel": kernel, "arch": arch, "pointers": kinds} | sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, required=True)
    parser.add_argument("--every", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    seen: dict[str, tuple[ASTSource, Launch]] = {}
    for op, sample, dtype, dot in plan(options.every):
        os.environ["PYML_TRITON_FP32"] = dot
        for launch in launches(op, sample, dtype, options.arch):
            source, key = source_of(launch)
            seen.setdefault(key, (source, launch))
    VARIANTS.extend((source, launch, options.arch) for source, launch in seen.values())
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:  # a fork has VARIANTS as they are here
        for line in pool.imap(compile_variant, range(len(VARIANTS))):
            print(json.dumps(line), flush=True)
    print(json.dumps({"functions": sorted(jit_functions())}))


if __name__ == "__main__":
    main()
