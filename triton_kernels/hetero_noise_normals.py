"""Triton kernel of the noise: the operations of csrc/hetero_noise/normal.h, in its order. Bound by memory."""

import triton
import triton.language as tl

TAIL = tl.constexpr(0x9E3779B97F4A7C15)  # the key of the refined tail is the key xor this
REFINE_BELOW = tl.constexpr(256)


@triton.jit
def radius(w, more, ACC: tl.constexpr):
    """sqrt(-2 ln u) of the words w, which `more` refines where they are below 2^8."""
    tail = ((w.to(tl.uint64) << 32) | more.to(tl.uint64)).to(ACC)
    if tl.float64 == ACC:
        u = (w.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        u = tl.where(w < REFINE_BELOW, (tail + 0.5) * 5.421010862427522e-20, u)
        r = tl.sqrt(-2.0 * tl.log(u))
    else:
        signed = w.to(tl.int32, bitcast=True).to(tl.float32)
        d = tl.fma(signed, 2.3283064365386963e-10, 1.1641532182693481e-10)  # u, from 1/2 on u - 1
        d = tl.where(w < REFINE_BELOW, tl.fma(tail, 5.421010862427522e-20, 2.710505431213761e-20), d)
        bits = d.to(tl.int32, bitcast=True)
        below = d > 0
        e = tl.where(below, ((bits >> 23) - 126).to(tl.float32), 0.0)
        z = tl.where(below, ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 1.0, d)
        h = tl.fma(z, -2.8290674686, -3.2791247368)
        h = tl.fma(h, z, -2.4173848629)
        h = tl.fma(h, z, -0.36188709736)
        h = tl.fma(h, z, -0.52737796307)
        h = tl.fma(h, z, 0.48736566305)
        h = tl.fma(h, z, -0.66726422310)
        h = tl.fma(h, z, 0.99999046326)
        r = tl.sqrt_rn(tl.fma(z, tl.fma(z, h, -2.0), e * -1.3862943611198906))
    return r


@triton.jit
def turned(w, r, ACC: tl.constexpr):
    """The two normals of an angle word and a radius."""
    low = (w << 2).to(tl.int32, bitcast=True)
    if tl.float64 == ACC:
        x = low.to(tl.float64) * 3.6572951981698e-10
        s, c = tl.sin(x), tl.cos(x)
    else:
        x = low.to(tl.float32) * 3.6572951981698e-10
        x2 = x * x
        s = tl.fma(tl.fma(x2, -1.9515249005e-4, 8.3321603015e-3), x2, -0.16666655242)
        s = tl.fma(s * x2, x, x)
        c = tl.fma(tl.fma(x2, 2.4438413675e-5, -1.3887367677e-3), x2, 4.1666645557e-2)
        c = tl.fma(tl.fma(c, x2, -0.5), x2, 1.0)
    c = tl.where((w >> 31) == 1, -c, c)
    swap = ((w >> 30) & 1) == 1
    return r * tl.where(swap, s, c), r * tl.where(swap, c, s)


@triton.jit
def changed(
    t, out, base, scale, columns, i, z, std, factor, size, count, MODE: tl.constexpr, KIND: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Elements i with the normals z; std and factor are of ACC."""
    inside = (i >= 0) & (i < size)
    if KIND == 0:
        s = tl.load(scale).to(ACC)
    elif KIND == 1:
        s = tl.load(scale + i, mask=inside, other=0.0).to(ACC)
    else:
        s = tl.load(scale + i // count, mask=inside, other=0.0).to(ACC)
        s = s * tl.load(columns + i % count, mask=inside, other=0.0).to(ACC)
    s = s * std
    old = tl.load(t + i, mask=inside, other=0.0).to(ACC)
    if MODE == 0:
        new = tl.fma(z, tl.zeros_like(z) + s, old) * factor
    elif MODE == 1:
        before = tl.load(base + i, mask=inside, other=0.0).to(ACC)
        new = tl.fma(tl.fma(z, tl.zeros_like(z) + s, old), tl.zeros_like(z) + factor, before)
    else:
        new = old * (s * z)
    tl.store(out + i, new.to(out.dtype.element_ty), mask=inside)


# Numbers that change from call to call: a kernel for each of their kinds (1, a multiple of 16) would be compiled anew.
@triton.jit(do_not_specialize=["step", "tensor_id", "first"])
def hetero_noise_kernel(
    t, out, base, scale, columns, key, std_high, std_low, factor_high, factor_low, step, tensor_id, first, size, count,
    MODE: tl.constexpr, KIND: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program: BLOCKS blocks of 64 elements, that is of 16 counters. Numbers come in two halves: a float argument of a
    launch has 32 bits."""
    std = tl.cast(std_high, ACC) + tl.cast(std_low, ACC)
    factor = tl.cast(factor_high, ACC) + tl.cast(factor_low, ACC)
    lanes = tl.arange(0, BLOCKS * 16)
    block = tl.cast(first, tl.int64) // 64 + tl.program_id(0).to(tl.int64) * BLOCKS + lanes // 16
    number = block * 16 + lanes % 16
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    same = (low * 0).to(tl.uint32)
    k = tl.load(key).to(tl.uint64, bitcast=True)
    w0, w1, w2, w3 = tl.philox(k, low, high, same + tl.cast(tensor_id, tl.uint32), same + tl.cast(step, tl.uint32))
    more0, more2 = same, same
    if tl.min(tl.minimum(w0, w2).to(tl.int64), 0) < REFINE_BELOW:
        more0, _, more2, _ = tl.philox(
            k ^ TAIL, low, high, same + tl.cast(tensor_id, tl.uint32), same + tl.cast(step, tl.uint32)
        )
    z0, z1 = turned(w1, radius(w0, more0, ACC), ACC)
    z2, z3 = turned(w3, radius(w2, more2, ACC), ACC)
    i = block * 64 + lanes % 16 - first
    changed(t, out, base, scale, columns, i, z0, std, factor, size, count, MODE, KIND, ACC)
    changed(t, out, base, scale, columns, i + 16, z1, std, factor, size, count, MODE, KIND, ACC)
    changed(t, out, base, scale, columns, i + 32, z2, std, factor, size, count, MODE, KIND, ACC)
    changed(t, out, base, scale, columns, i + 48, z3, std, factor, size, count, MODE, KIND, ACC)
