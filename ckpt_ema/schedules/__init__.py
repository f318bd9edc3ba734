"""From steps to the weight of each checkpoint; floats only."""
