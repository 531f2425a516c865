"""The commands of `lora-stack`, a module each.

Each has `SUMMARY`, `add_arguments(parser)` and `run(arguments)`.
A module's top imports nothing heavy; `run` does. `run` returns the exit code: 0 held, 1 a verdict
failed, 5 nothing ran; bad input is an `InputError`.
"""
