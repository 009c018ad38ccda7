"""Numbers that several kernels share."""

ROWS = 64
"""Rows of a transposed state, columns of V, that a warpgroup keeps: as many as a product on the
tensor cores of Hopper wants of its left operand."""
LOG2_E = 1.4426950408889634
"""Turns natural logarithms into those to the base 2, whose exponential is one instruction."""
G, BETA, RQ, RK, INTO, SCORES, STRENGTH = range(7)
"""Rows of `Workspace.tokens`: the gates' sums, beta, the norms, and factors of rows and columns."""
ONTO, READ, THROUGH, DECAY = range(4)
"""Rows of `walk`, the factors with which `scan` takes a chunk's tokens: e^{gamma - G} rk, scale
e^G rq, -e^G rk; and e^gamma, in its first column."""
