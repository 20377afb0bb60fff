"""Triton kernels of the head family. AdamW in the order of csrc/head_update/adam.h, bound by memory; edits of heads by
rows, each program with whole rows of one head.
"""

import triton
import triton.language as tl

ROUNDING = tl.constexpr(0x2545F4914F6CDD1D)  # the key of the rounding is the key xor this
SMALLEST_HALF = tl.constexpr(0x38800000)


@triton.jit
def stochastic(x, word, ROUNDS: tl.constexpr):
    """x (float32), rounded up or down to a bfloat16 (ROUNDS 1) or a float16 (2) by the low bits of a random word."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if ROUNDS == 1:
        found = (bits + (word & 0xFFFF)) & 0xFFFF0000
    else:
        low, sign = word & 0x1FFF, bits & 0x80000000
        small = size < SMALLEST_HALF
        exact = tl.where(small, size, 0).to(tl.float32, bitcast=True) * 137438953472.0  # in steps of 2^-24, 13 bits on
        steps = (exact.to(tl.int32).to(tl.uint32) + low) >> 13
        denormal = (steps.to(tl.int32).to(tl.float32) * 5.960464477539063e-08).to(tl.uint32, bitcast=True)
        found = sign | tl.where(small, denormal, (size + low) & 0x7FFFE000)
    return tl.where(size >= 0x7F800000, bits, found).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x, pointer):
    """x as a store to the pointer would leave it. To bfloat16 by its bits, as a GPU rounds: Triton's interpreter cuts
    off."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True).to(x.dtype), x)
    else:
        return x.to(pointer.dtype.element_ty).to(x.dtype)


@triton.jit
def adam_elements(
    param, grad, first, second, master, i, word, size, columns, p_row, p_col, g_row, g_col, m_row, m_col, v_row, v_col,
    w_row, w_col, decay, to_grad, kept, to_square, root, eps, rate, MASTER: tl.constexpr, ROUNDS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Elements i of a slice; the numbers are of ACC."""
    inside = i < size
    r, c = i // columns, i % columns
    at_p, at_m, at_v = param + r * p_row + c * p_col, first + r * m_row + c * m_col, second + r * v_row + c * v_col
    at_w = master + r * w_row + c * w_col
    same = tl.zeros_like(i).to(ACC)
    g = tl.load(grad + r * g_row + c * g_col, mask=inside, other=0.0).to(ACC)
    m = tl.load(at_m, mask=inside, other=0.0).to(ACC)
    v = tl.load(at_v, mask=inside, other=1.0).to(ACC)
    p = tl.load(at_p, mask=inside, other=0.0).to(ACC)
    if MASTER:  # unless something else has written to the parameter
        w = tl.load(at_w, mask=inside, other=0.0).to(ACC)
        p = tl.where(nearest(w, param) == p, w, p)
    # From the nearer end, as torch's lerp: with beta1 = 0 all of an old m goes, however large.
    m = tl.where(to_grad < 0.5, tl.fma(same + to_grad, g - m, m), tl.fma(same + (to_grad - 1), g - m, g))
    v = tl.fma(to_square * g, g, kept * v)
    if tl.float64 == ACC:
        p = tl.fma(same + rate, m / tl.fma(tl.sqrt(v), same + root, same + eps), decay * p)
    else:
        p = tl.fma(same + rate, tl.div_rn(m, tl.fma(tl.sqrt_rn(v), same + root, same + eps)), decay * p)
    tl.store(at_m, m.to(first.dtype.element_ty), mask=inside)
    tl.store(at_v, v.to(second.dtype.element_ty), mask=inside)
    if MASTER:
        tl.store(at_w, p.to(master.dtype.element_ty), mask=inside)
    p = stochastic(p.to(tl.float32), word, ROUNDS) if ROUNDS > 0 else nearest(p, param)
    tl.store(at_p, p.to(param.dtype.element_ty), mask=inside)


# Numbers that change from call to call: a kernel for each of their kinds (1, a multiple of 16) would be compiled anew.
@triton.jit(do_not_specialize=["step", "tensor_id"])
def adamw_slices_kernel(
    param, grad, first, second, master, key, decay_high, decay_low, to_grad_high, to_grad_low, kept_high, kept_low,
    to_square_high, to_square_low, root_high, root_low, eps_high, eps_low, rate_high, rate_low, step, tensor_id, size,
    columns, p_row, p_col, g_row, g_col, m_row, m_col, v_row, v_col, w_row, w_col, MASTER: tl.constexpr,
    ROUNDS: tl.constexpr, ACC: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program: BLOCKS blocks of 64 elements, that is of 16 counters."""
    decay = tl.cast(decay_high, ACC) + tl.cast(decay_low, ACC)
    to_grad = tl.cast(to_grad_high, ACC) + tl.cast(to_grad_low, ACC)
    kept = tl.cast(kept_high, ACC) + tl.cast(kept_low, ACC)
    to_square = tl.cast(to_square_high, ACC) + tl.cast(to_square_low, ACC)
    root = tl.cast(root_high, ACC) + tl.cast(root_low, ACC)
    eps = tl.cast(eps_high, ACC) + tl.cast(eps_low, ACC)
    rate = tl.cast(rate_high, ACC) + tl.cast(rate_low, ACC)
    lanes = tl.arange(0, BLOCKS * 16)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + lanes // 16
    number = block * 16 + lanes % 16
    i = block * 64 + lanes % 16
    low = number.to(tl.uint32)
    w0, w1, w2, w3 = low, low, low, low
    if ROUNDS > 0:
        same = (low * 0).to(tl.uint32)
        k = tl.load(key).to(tl.uint64, bitcast=True) ^ ROUNDING
        high = (number >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(k, low, high, same + tl.cast(tensor_id, tl.uint32), same + tl.cast(step, tl.uint32))
    adam_elements(
        param, grad, first, second, master, i, w0, size, columns, p_row, p_col, g_row, g_col, m_row, m_col, v_row,
        v_col, w_row, w_col, decay, to_grad, kept, to_square, root, eps, rate, MASTER, ROUNDS, ACC,
    )  # fmt: skip
    adam_elements(
        param, grad, first, second, master, i + 16, w1, size, columns, p_row, p_col, g_row, g_col, m_row, m_col, v_row,
        v_col, w_row, w_col, decay, to_grad, kept, to_square, root, eps, rate, MASTER, ROUNDS, ACC,
    )  # fmt: skip
    adam_elements(
        param, grad, first, second, master, i + 32, w2, size, columns, p_row, p_col, g_row, g_col, m_row, m_col, v_row,
        v_col, w_row, w_col, decay, to_grad, kept, to_square, root, eps, rate, MASTER, ROUNDS, ACC,
    )  # fmt: skip
    adam_elements(
        param, grad, first, second, master, i + 48, w3, size, columns, p_row, p_col, g_row, g_col, m_row, m_col, v_row,
        v_col, w_row, w_col, decay, to_grad, kept, to_square, root, eps, rate, MASTER, ROUNDS, ACC,
    )  # fmt: skip


@triton.jit
def head_edit_kernel(
    x, out, heads, values, matrix, x_row, x_head, x_col, o_row, o_head, o_col, v_row, v_head, v_col, m_head, m_in,
    m_out, keep_high, keep_low, strength_high, strength_low, count, dim, VALUES: tl.constexpr, MATRIX: tl.constexpr,
    KEEP: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, head): the sum over the inputs runs in order."""
    keep = tl.cast(keep_high, ACC) + tl.cast(keep_low, ACC)
    strength = tl.cast(strength_high, ACC) + tl.cast(strength_low, ACC)
    i = tl.program_id(1).to(tl.int64)
    head = tl.load(heads + i).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH).to(tl.int64)
    inside = (r < count)[:, None] & (c < dim)[None, :]
    sum = tl.zeros([ROWS, WIDTH], ACC)
    if VALUES:
        at = values + r[:, None] * v_row + i * v_head + c[None, :] * v_col
        sum = tl.load(at, mask=inside, other=0.0).to(ACC)
    if MATRIX:
        for d in range(dim):
            column = tl.load(x + r * x_row + head * x_head + d * x_col, mask=r < count, other=0.0).to(ACC)
            row = tl.load(matrix + i * m_head + d * m_in + c * m_out, mask=c < dim, other=0.0).to(ACC)
            sum += column[:, None] * row[None, :]
    sum = sum * strength
    if KEEP:
        at = x + r[:, None] * x_row + head * x_head + c[None, :] * x_col
        sum += keep * tl.load(at, mask=inside, other=0.0).to(ACC)
    at = out + r[:, None] * o_row + head * o_head + c[None, :] * o_col
    if MATRIX:
        tl.debug_barrier()  # in place: several warps read a row, and all of them must have before one writes it
    tl.store(at, sum.to(out.dtype.element_ty), mask=inside)


@triton.jit
def head_edit_matrix_kernel(
    grad, x, heads, part, g_row, g_head, g_col, x_row, x_head, x_col, strength_high, strength_low, count, size, dim,
    ACC: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, head, chunk of rows)."""
    strength = tl.cast(strength_high, ACC) + tl.cast(strength_low, ACC)
    i, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = tl.load(heads + i).to(tl.int64)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH).to(tl.int64)
    sum = tl.zeros([BLOCK, WIDTH], ACC)
    begin = split * size
    for r in range(begin, tl.minimum(begin + size, count)):
        of_row = tl.load(grad + r * g_row + head * g_head + o * g_col, mask=o < dim, other=0.0).to(ACC)
        row = tl.load(x + r * x_row + head * x_head + c * x_col, mask=c < dim, other=0.0).to(ACC)
        sum += of_row[:, None] * row[None, :]
    at = part + ((split * tl.num_programs(1) + i) * dim + o)[:, None] * dim + c[None, :]
    tl.store(at, sum * strength, mask=(o < dim)[:, None] & (c < dim)[None, :])
