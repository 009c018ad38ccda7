"""Forward: `prepare`, which needs no state, then `scan`; `plan.py` chooses and launches them."""
