"""Forward: what needs no state, the scan over the chunks, and their order."""
