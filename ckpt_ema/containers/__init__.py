"""What checkpoints are stored in: where each tensor's bytes are, from headers, and their bytes."""
