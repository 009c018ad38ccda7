"""Numbers that several kernels share."""

ROWS = 64
"""Rows of a transposed state, columns of V, that a warpgroup keeps: as many as a product on the
tensor cores of Hopper wants of its left operand."""
LOG2_E = 1.4426950408889634
"""Turns natural logarithms into those to the base 2, whose exponential is one instruction."""
G, BETA = range(2)
"""Rows of `Memory.gates`: the gates' sums, times log2(e), and the strengths."""
INTO, SCORES, STRENGTH, RK = range(4)
"""Rows of `Memory.tokens`: factors of columns and rows, and the norms of k."""
ONTO, READ, THROUGH, DECAY = range(4)
"""Rows of `walk`, the factors with which `scan` takes a chunk's tokens: e^{gamma - G} rk, scale
e^G rq, -e^G rk; and e^gamma, in its first column."""
