"""From checkpoints and options to a `Plan`: every choice made and every check passed."""
