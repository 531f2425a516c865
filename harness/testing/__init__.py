"""Stacks for tests, shipped for users' own: seeded tiny models and adapters, and training steps.

`harness.testing.tiny` builds random stacks in milliseconds; `harness.testing.training` holds the
mechanics of the two training stages.
"""
