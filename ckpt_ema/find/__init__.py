"""From a folder or a list of paths to checkpoints in training order; no tensor is read."""
