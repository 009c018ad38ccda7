"""Building blocks that kernels of several stages share."""
