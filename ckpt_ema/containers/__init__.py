"""The formats of checkpoints: where each tensor's bytes are, from headers alone."""
