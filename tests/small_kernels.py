"""Small kernels whose instructions can be counted by hand: run as a script it compiles them, and
prints the counts of their parts (see benchmarks/gpu/sass.py) as JSON."""

import json
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu import sass


@triton.jit
def exponentials(x_ptr, y_ptr, n):
    """exp2 of n numbers, 512 at a time."""
    for i in range(0, n, 512):
        at = i + tl.arange(0, 512)
        tl.store(y_ptr + at, tl.exp2(tl.load(x_ptr + at)))


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K):
    """[128 × K]·[K × 128] in K-steps of 64."""
    m, k = tl.arange(0, 128), tl.arange(0, 64)
    c = tl.zeros((128, 128), tl.float32)
    for d in range(0, K, 64):
        a = tl.load(a_ptr + m[:, None] * K + d + k[None, :])
        b = tl.load(b_ptr + m[None, :] * K + d + k[:, None])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + m[:, None] * 128 + m[None, :], c)


@triton.jit
def persistent(a_ptr, b_ptr, c_ptr, K):
    """The product, tile after tile of a program, the two loops made one by the compiler."""
    m, k = tl.arange(0, 128), tl.arange(0, 64)
    for tile in tl.range(tl.program_id(0), 1000, tl.num_programs(0), flatten=True):
        c = tl.zeros((128, 128), tl.float32)
        for d in range(0, K, 64):
            a = tl.load(a_ptr + m[:, None] * K + d + k[None, :])
            b = tl.load(b_ptr + (tile * 128 + m)[None, :] * K + d + k[:, None])
            c = tl.dot(a, b, c)
        tl.store(c_ptr + tile * 128 * 128 + m[:, None] * 128 + m[None, :], tl.exp2(c))


def counted(kernel, arch: str, types: list[str], num_warps: int = 8) -> list[dict[str, int]]:
    names = kernel.arg_names
    signature = dict(zip(names, [*types, "i32"], strict=True))
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
    target = GPUTarget("hip", arch, 64)
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": num_warps, "num_stages": 2 if arch == "gfx942" else 3}
    compiled = triton.compile(ASTSource(kernel, signature, {}, divisible), target, options)
    parts = sass.parts(sass.text_of(compiled), multiplies=kernel is not exponentials)
    return [dict(part) for part in (parts.step, parts.tile, parts.program)]


if __name__ == "__main__":
    products = ["*bf16", "*bf16", "*fp32"]
    print(
        json.dumps(
            {
                "exponentials": counted(exponentials, "sm_90", ["*fp32", "*fp32"], num_warps=4),
                "persistent": counted(persistent, "sm_90", products),
                **{
                    arch: counted(product, arch, products)
                    for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
                },
            }
        )
    )
