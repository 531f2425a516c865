"""Measurements of the harness itself, each a script: `python -m harness.bench.<name>`."""
