"""B-spline maths inside Triton kernels: the k + 1 functions that are not zero at x, by the recursion of de Boor.

Edge rules are those of pyml/reference/bspline.py. In the interval of x no denominator vanishes except on grids without
any interval, so repeated knots need no case of their own.
"""

import triton
import triton.language as tl

ZERO = tl.constexpr(0)
CLAMP = tl.constexpr(1)
LINEAR = tl.constexpr(2)
MODES = {"zero": 0, "clamp": 1, "linear": 2}
SILU = tl.constexpr(0)
RELU = tl.constexpr(1)
TANH = tl.constexpr(2)
IDENTITY = tl.constexpr(3)
BASES = {"silu": 0, "relu": 1, "tanh": 2, "identity": 3}


@triton.jit
def nonzero(x, knots, count, ORDER: tl.constexpr, DERIVATIVE: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr):
    """The functions that are not zero at x (or their derivative), in the dtype of x.

    knots: pointers to the first knot of each x's row, broadcastable to x; count: knots in a row; 2^STEPS > count.
    Returns the index of the first function (it may be negative or past the last one: such functions do not exist), the
    ORDER + 1 values, and the value of all other functions: 0, or NaN where the reference has NaN.
    """
    dtype = x.dtype
    EDGE: tl.constexpr = 0 if MODE == ZERO else ORDER
    low = tl.load(knots + EDGE).to(dtype)
    high = tl.load(knots + (count - 1 - EDGE)).to(dtype)
    one = tl.full(x.shape, 1.0, dtype)
    beyond = tl.full(x.shape, 0.0, dtype)
    if MODE == ZERO:
        closed = high == tl.load(knots + (count - 2)).to(dtype)
        inside = ((x >= low) & (x < high)) | ((x == high) & closed) | (x != x)
        near = tl.where(inside, x, low)  # an infinite x must not turn 0 * x into NaN
        start = tl.where(inside, one, 0.0)
    else:
        near = tl.where(x < low, low, tl.where(x > high, high, x))
        start = one
        if DERIVATIVE > MODE - 1:  # past the ends a constant (clamp) or a line (linear)
            start = tl.where((x != near) & (x == x), 0.0, one)
        if MODE == LINEAR and DERIVATIVE == 0:
            beyond = tl.where(x != near, x - near, 0.0)

    # Binary search for the number of knots at or below x; strictly below at the upper end, which gives the last
    # interval of positive width.
    at = tl.where(near == near, near, low)
    found = tl.zeros(x.shape, tl.int32)
    for s in tl.static_range(STEPS):
        candidate = found + (1 << (STEPS - 1 - s))
        t = tl.load(knots + (tl.minimum(candidate, count) - 1)).to(dtype)
        taken = (candidate <= count) & ((at > t) | ((at == t) & (at < high)))
        found = tl.where(taken, candidate, found)
    j = tl.minimum(tl.maximum(found - 1, 0), count - 2)
    j = tl.where(low < high, j, 0)
    start = tl.where(low < high, start, 0.0)  # an inner grid of no width has no functions to continue

    around = (tl.load(knots + tl.minimum(tl.maximum(j + (1 - ORDER), 0), count - 1)).to(dtype),)
    for m in tl.static_range(1, 2 * ORDER):
        index = tl.minimum(tl.maximum(j + (1 - ORDER + m), 0), count - 1)
        around += (tl.load(knots + index).to(dtype),)
    values = (start,)
    for r in tl.static_range(1, ORDER + 1):
        carry = tl.zeros(x.shape, dtype)
        slope = tl.zeros(x.shape, dtype)
        lifted = values
        for q in tl.static_range(r):
            left = around[ORDER - r + q]
            right = around[ORDER + q]
            width = right - left
            term = tl.where(width == 0, 0.0, values[q] / tl.where(width == 0, 1.0, width))
            if r > ORDER - DERIVATIVE:
                value = carry - r * term
                carry = r * term
            elif MODE == LINEAR and DERIVATIVE == 0 and r == ORDER:
                value = carry + (right - near) * term + beyond * (slope - r * term)
                carry = (near - left) * term
                slope = r * term
            else:
                value = carry + (right - near) * term
                carry = (near - left) * term
            if q == 0:
                lifted = (value,)
            else:
                lifted += (value,)
        if MODE == LINEAR and DERIVATIVE == 0 and r == ORDER:
            carry += beyond * slope
        lifted += (carry,)
        values = lifted
    rest = beyond * 0.0
    if DERIVATIVE < ORDER:
        rest = rest + near * 0.0
    return j - ORDER, values, rest


@triton.jit
def dense(first, values, rest, columns, functions, ORDER: tl.constexpr):
    """Spread the values over columns: [M, F] -> [M, F, C]; only in registers, never in memory."""
    column = tl.where(columns < functions, columns, -100)
    place = column[None, None, :] - first[:, :, None]
    tile = rest[:, :, None] + tl.zeros(place.shape, rest.dtype)
    for q in tl.static_range(ORDER + 1):
        tile = tl.where(place == q, values[q][:, :, None], tile)
    return tile


@triton.jit
def contract(first, values, rest, coeff, functions, ORDER: tl.constexpr):
    """sum_c coeff[c] * function_c(x): coeff holds pointers to the first coefficient of each x's row."""
    total = rest
    for q in tl.static_range(ORDER + 1):
        c = first + q
        exists = (c >= 0) & (c < functions)
        weight = tl.load(coeff + tl.where(exists, c, 0)).to(total.dtype)
        total += tl.where(exists, values[q] * weight, 0.0)
    return total


@triton.jit
def tanh(x):
    """Relative error of a few ulp everywhere: 1 - exp(-2|x|) cancels near 0, so a series takes over there."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    series = 62.0 / 2835 - s * (1382.0 / 155925)
    series = -17.0 / 315 + s * series
    series = 2.0 / 15 + s * series
    series = -1.0 / 3 + s * series
    return tl.where(size < 0.125, x + x * s * series, tl.where(x < 0, -far, far))


@triton.jit
def base_value(x, BASE: tl.constexpr):
    if BASE == SILU:
        y = x / (1.0 + tl.exp(-x))
    elif BASE == RELU:
        y = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    elif BASE == TANH:
        y = tanh(x)
    else:
        y = x
    return y


@triton.jit
def base_slope(x, BASE: tl.constexpr):
    if BASE == SILU:
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 + x * (1.0 - s))
    elif BASE == RELU:
        y = tl.where(x <= 0, 0.0, tl.full(x.shape, 1.0, x.dtype))
    elif BASE == TANH:
        t = tanh(x)
        y = 1.0 - t * t
    else:
        y = tl.full(x.shape, 1.0, x.dtype)
    return y


@triton.jit
def sum_chunks_kernel(part, total, chunks, size, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr):
    """total[e] = sum_s part[s, e] in a fixed order: the second stage of every coefficient gradient."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK_S, BLOCK_E), ACC)
    for s0 in range(0, chunks, BLOCK_S):
        s = (s0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        keep = (s[:, None] < chunks) & (e[None, :] < size)
        acc += tl.load(part + s[:, None] * size + e[None, :], mask=keep, other=0.0).to(ACC)
    tl.store(total + e, tl.sum(acc, 0).to(total.dtype.element_ty), mask=e < size)
