"""Parts that kernels of several passes share."""
