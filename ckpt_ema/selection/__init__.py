"""Selecting among averages by evaluating each of them."""
