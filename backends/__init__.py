"""The built-in backends, one package each. The registry imports a backend when it is first used."""
