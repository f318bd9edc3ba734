"""What looks at values while they pass."""
