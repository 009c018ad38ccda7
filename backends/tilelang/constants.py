"""Numbers that several kernels share."""

ROWS = 64
"""Rows of a transposed state, columns of V, that a warpgroup keeps: as many as a product on the
tensor cores of Hopper wants of its left operand."""
LOG2_E = 1.4426950408889634
"""Turns natural logarithms into those to the base 2, whose exponential is one instruction."""
