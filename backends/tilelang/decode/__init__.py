"""Decode: the serving step, which reads states from a pool and writes them back."""
