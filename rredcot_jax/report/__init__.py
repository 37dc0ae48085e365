"""Pages, figures, terminal output and statistics about runs and traces."""
