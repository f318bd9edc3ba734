"""What checkpoints are like beside each other: norms, distances, and which stand out."""
