"""Runs that are interrupted, that hang, run out of memory or are killed."""
