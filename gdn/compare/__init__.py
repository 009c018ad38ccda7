"""`gdn compare`: agreement of every backend with float64, then its times."""
