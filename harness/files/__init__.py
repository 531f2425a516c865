"""Files as they lie on a disk: what they are, read strictly, hashed, and written whole.

Knows nothing of adapters, checkpoints or snapshots.
"""
