"""Compiled kernels of gdn, in `kernels/`; gdn.backends.tilelang finds them there."""
