"""What people are shown: foreign text made inert for terminals, Markdown and HTML, differences word
by word, pages that need nothing beside them, and the one place that imports matplotlib.

Knows nothing of what is shown.
"""
