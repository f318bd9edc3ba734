"""Monitors: they look at values while these are folded."""
