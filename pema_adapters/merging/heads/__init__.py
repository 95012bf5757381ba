"""Heads of AutoAdapterModel as those of ordinary classes.

`registry` says, as data, which class of a model family computes what a flexible head computes; `convert` renames the
tensors, or says why the two differ. A new model family is a row in `registry`.
"""
