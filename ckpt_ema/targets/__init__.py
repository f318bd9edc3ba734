"""What an output consists of, laid out before a byte of it exists."""
