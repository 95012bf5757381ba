"""The half of the library that trains; it needs torch, Transformers and adapters. The other half is `merging`.

`shrink_embeddings`, `restore_embeddings` (`shrink.py`), `load_model`, `save_delta` and `parameter_groups` are public.
`embedding` holds the partial embedding, `base` the pretrained rows on disk, `output` the tied heads of language models,
`method` PEMA as a method of adapters, and `upstream` everything that depends on private names of adapters and
Transformers; `patches.py` says what PEMA does at each function that it patches. A change stays in one of these
packages; the two halves share only the artifact, whose format is in `formats`.
"""
