"""Base checkpoint + delta -> full checkpoint, as a plan of byte segments.

`api.merge_checkpoint` opens the inputs, `planning` turns them into a `Plan`, and one of its readers writes it: `output`
a new folder, `in_place` the base itself, `publishing` the Hub. README.md shows the way through and where to add a
segment, a model family or a method. Nothing here imports torch but the reader of pickles.
"""
