"""The built-in backends, one package each, imported by name when first needed."""
