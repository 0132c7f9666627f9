"""The text that kernels share: arithmetic before the scan, and what runs it on each device."""

HEADER = '''"""Written by models.features.source, for one declaration."""
import math

import numpy as np

NAN = math.nan
DAY_US = 86_400_000_000.0
SPLIT = 134_217_729.0


@device
def sum_error(a, b, s):
    """What s = a + b lost."""
    v = s - a
    return (a - (s - v)) + (b - v)


@device
def product_error(a, b, p):
    """What p = a * b lost."""
    c = SPLIT * a
    ah = c - (c - a)
    al = a - ah
    c = SPLIT * b
    bh = c - (c - b)
    bl = b - bh
    return ((ah * bh - p) + ah * bl + al * bh) + al * bl


@device
def covariation(n, h, l, g, k, hg, lg):
    """n * sum(xy) - sum(x) * sum(y), from pairs: x sums to h + l, y to g + k, xy to hg + lg."""
    a = n * hg
    b = h * g
    lost = product_error(float(n), hg, a) - product_error(h, g, b) + n * lg - (h * k + l * g)
    v = (a - b) + lost
    # What is smaller than the pairs' own rounding is none.
    return v if abs(v) > 1e-30 * abs(a) else 0.0


@device
def spread(n, h, l, h2, l2):
    """Sample standard deviation from the number, the sum h + l and the sum of squares h2 + l2."""
    if n < 2:
        return NAN
    v = covariation(n, h, l, h, l, h2, l2)
    return math.sqrt(v / (n * (n - 1.0))) if v > 0.0 else 0.0


@device
def slope(n, h, l, t, tl, t2, t2l, ht, htl):
    """Least-squares slope, a day, of values that sum to h + l over times that sum to t + tl."""
    if n < 2:
        return NAN
    d = covariation(n, t, tl, t, tl, t2, t2l)
    if not d > 0.0:
        return NAN
    return covariation(n, h, l, t, tl, ht, htl) / d * DAY_US


@device
def first_value(m, j, i, end):
    """The first value of i:end that is there."""
    while i < end and m[j, i] != m[j, i]:
        i += 1
    return m[j, i] if i < end else NAN


@device
def last_value(m, j, start, i):
    """The last value of start:i that is there."""
    while i > start and m[j, i - 1] != m[j, i - 1]:
        i -= 1
    return m[j, i - 1] if i > start else NAN


@device
def bits_set(word):
    """Number of set bits."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@device
def bits_between(bits, row, z, s, e):
    """Number of set bits in s:e; none is set from e on."""
    if s >= e:
        return 0
    first = s >> 6
    n = bits_set(bits[row, z + first] >> np.uint64(s & 63))
    for k in range(first + 1, ((e - 1) >> 6) + 1):
        n += bits_set(bits[row, z + k])
    return n

'''

ARGUMENTS = "cuts, starts, ends, t, m, previous, slot, flags"

CPU = f'''

@njit(nogil=True, cache=True, error_model="numpy")
def run(first, last, row, own, bounds, cut_at, longest, {ARGUMENTS}, who, floats_out, ints_out):
    """Writes the rows of the entities first:last, from `row` on.

    own: 0 if all have the same cutoffs, 1 if entity e's are cuts[cut_at[e]:cut_at[e + 1]].
    """
    fs = np.empty((longest + 1, {{doubles}}), np.float64)
    ints = np.empty((longest + 1, {{ints}}), np.int32)
    stack = np.empty((longest + 1, {{stacks}}), np.int32)
    bits = np.empty(({{distinct}}, longest // 64 + 1), np.uint64)
    acc = np.empty(({{slots}}, 2), np.float64)
    for e in range(first, last):
        s0 = bounds[e]
        s1 = bounds[e + 1]
        if own:
            c0 = cut_at[e]
            c1 = cut_at[e + 1]
        else:
            c0 = 0
            c1 = cuts.size
            if s0 == s1:
                c0 = c1
            while c0 < c1 and cuts[c0] <= t[s0]:
                c0 += 1
        if c0 == c1:
            continue
        for c in range(c1 - c0):
            who[row + c] = e
        scan(
            s0, s1, c0, c1, row, 0, 0, {ARGUMENTS},
            fs, ints, stack, bits, acc, floats_out, ints_out,
        )
        row += c1 - c0
    return row
'''

CUDA = f'''

@cuda.jit
def run(rows, own, bounds, cut_at, {ARGUMENTS}, fs, ints, stack, bits, floats_out, ints_out):
    """A thread an entity; entity e's rows start at rows[e]."""
    e = cuda.grid(1)
    if e >= bounds.size - 1:
        return
    acc = cuda.local.array(({{slots}}, 2), np.float64)
    s0 = bounds[e]
    s1 = bounds[e + 1]
    if own:
        c0 = cut_at[e]
        c1 = cut_at[e + 1]
    else:
        c1 = cuts.size
        c0 = c1 - (rows[e + 1] - rows[e])
    if c0 < c1:
        scan(
            s0, s1, c0, c1, rows[e], s0 + e, (s0 >> 6) + e, {ARGUMENTS},
            fs, ints, stack, bits, acc, floats_out, ints_out,
        )
'''
