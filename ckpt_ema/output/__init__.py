"""What is written: the files of an average, whole or not at all, and where they come from."""
