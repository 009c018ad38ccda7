"""gdn as the engine of other libraries' models, a module each."""
