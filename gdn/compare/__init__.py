"""`gdn compare`: check every backend against float64, then time it."""
