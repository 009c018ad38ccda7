"""Backward: recomputed states, the reverse scan, and the gradients chunk by chunk."""
