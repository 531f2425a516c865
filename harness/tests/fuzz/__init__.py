"""Readers of foreign bytes, held against the reference readers: fuzzed, and replayed."""
