"""One module for each source of credit."""
