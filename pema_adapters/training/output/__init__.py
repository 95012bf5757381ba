"""The output side of language models, whose head is tied to the input embedding: both share the matrix E [V, d].

`convert_heads` turns such a head into a `PartialOutput`, which keeps computing logits over all V tokens while the input
embedding has K rows; `full_matrix.py` brings E back into memory, for `restore_embeddings` and `merge_adapter`. How the
logits are computed and where the base's rows are held in the meantime may be changed here; the invariant is that loss
and gradients equal those of the full model (tests/training/output).
"""
