"""The rows of `factors`, an array that several backward kernels keep in shared memory."""

from ..tile.layout import factor_rows


def rows_of_factors(K: int, channels: bool) -> int:
    """Rows of `factors` in the scans. With a decay per channel they are `scan_factors`, with beta,
    rq and rk behind them (`tile/layout.py`); else see `Factor`."""
    return factor_rows(K, channels) + 3 if channels else 4


class Factor:
    """Rows of `factors`, the factors of a chunk's tokens in shared memory: float32 [rows, C]."""

    G = 0  # the gates' running sum, natural logarithm
    BETA = 1
    RQ, RK = 2, 3  # 1 / norm of q and of k, or 1 without the L2 norm
    RV = 4  # rowsum(R * V), one row for every 64 columns of V; only in `gradients`
    # In float16, as many rows follow: the scales of the rows of S^T and U^T (`tile/row_scales.py`).

    G_BETA = slice(0, 2)  # written together by `gate_sums`
    NORMS = slice(2, 4)  # written together by forward
