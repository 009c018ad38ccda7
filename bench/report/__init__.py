"""Tables, plots and a page from the results of `pytest bench`."""
