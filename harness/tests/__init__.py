"""Is the harness right? Mirrors the modules."""
