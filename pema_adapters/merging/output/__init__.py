"""From a plan to a folder on disk, which appears under its name when all of it is there.

`staging` renames a complete folder into place, `writer` copies and clones, `verify` compares, `free_space` asks before,
`manifest` and `model_card` describe the result.
"""
