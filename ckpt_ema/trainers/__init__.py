"""What trainers save, and the names by which it is recognised: data only."""
