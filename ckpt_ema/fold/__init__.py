"""Carrying a plan out: reading tiles, folding them, handing them on; compiled, or by torch."""
