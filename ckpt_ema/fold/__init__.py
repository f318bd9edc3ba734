"""Carrying a plan out: reading tiles, folding them, handing them on. It needs torch."""
