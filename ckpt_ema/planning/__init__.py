"""Everything decided before a tensor is read."""
