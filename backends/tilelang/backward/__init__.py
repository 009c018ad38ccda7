"""Backward: states again, the reverse scan, and the gradients chunk by chunk."""
