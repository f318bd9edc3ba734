"""Averaging a run while it goes on: what is new in it, and the loop that folds it."""
