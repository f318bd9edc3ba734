"""Verifying an output: are its files whole, and is it the average that its manifest claims?"""
