"""The output side of language models, whose head is tied to the input embedding: both share the matrix E [V, d].

`convert_heads` turns such a head into a `PartialOutput`, which returns `LazyLogits`: a cross entropy on them reads E in
blocks of rows, and neither E nor the logits [N, V] are in memory. README.md explains the modules. Invariants: loss and
gradients equal those of the full model (tests/training/output/test_families.py), and whatever is done with lazy logits
gives what real ones give (test_lazy_logits.py).
"""
