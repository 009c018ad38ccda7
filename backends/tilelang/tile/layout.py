"""Constants that several kernels share: tile sizes, and rows of buffers with several vectors."""

ROWS = 64
"""Rows of S^T [V, K] that one warpgroup holds, which are columns of V: the left operand of a WGMMA
has 64 rows."""
BLOCKS_PER_SM = 4
"""Thread blocks of `prepare` on an SM, limited by registers and shared memory."""
LOG2_E = 1.4426950408889634
"""Converts an exponent from base e to base 2, whose exponential is one instruction."""
G, BETA = range(2)
"""Rows of `gates` [2, C]: the running sum of the gates times log2(e), and beta."""
COLUMN_EXPONENT, SCALE_RQ, BETA_RK, RK, KEY_SQUARES = range(5)
"""Rows of `IntraChunkSmem.token_factors` [5, C]: G - log2 rk, scale rq, beta rk, rk and k.k."""
U_FACTOR, QS_FACTOR, KS_FACTOR, S_FACTOR = range(4)
"""Rows of `scan_factors` [slots, HV, 4, C], what a scan multiplies by: U by e^{gamma - G} rk, Q S
by scale e^G rq, K S by -e^G rk, and S by e^gamma, which stands in column 0. With a decay per
channel the first three are scales of rows, and e^gamma [K] fills the rows from S_FACTOR on.
Backward has beta, rq and rk behind them."""
Q_IN, K_IN, K_OUT = range(3)
"""Rows of q and k with their decays, in `decayed_rows` [slots, HV, 3, C, K]."""


def factor_rows(K: int, channels: bool) -> int:
    """Rows of `scan_factors` in forward."""
    return S_FACTOR + (K // 64 if channels else 1)


def token_rows(K: int) -> tuple[int, int, int]:
    """Rows BETA, RQ and RK of `scan_factors` in backward, with a decay per channel."""
    first = factor_rows(K, channels=True)
    return first, first + 1, first + 2
