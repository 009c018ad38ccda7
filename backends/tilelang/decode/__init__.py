"""Decode: the step of a server, from and into a pool of states."""
