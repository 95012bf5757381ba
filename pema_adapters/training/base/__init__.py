"""The base of a model: the pretrained rows of E [V, d], where they are on disk, and the fingerprint of the rest.

`find_base` gives a `BaseModel`: `MappedRows` over the checkpoint or a spill file, and the fingerprint of an artifact,
taken from the checkpoint or a `LiveModel`. `StoredMatrix` is the matrix of a checkpoint that `load_model` does
not load. `model_vocabulary.py` finds a model's token embedding and completes a vocabulary. How rows are stored, cached
or checked for changes may be changed here; what a fingerprint covers is decided in `formats/fingerprint.py`.
"""
