"""Makers of runs, of their files and of what breaks them, for tests alone."""
