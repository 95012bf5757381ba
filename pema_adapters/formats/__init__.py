"""The files that pema_adapters reads: checkpoints, adapters, fingerprints. Parsed and validated before use; no torch.

`Checkpoint` is the folder of a base, `Delta` (from `read_delta`) the result of training, `StoredTensor` one tensor of a
file, and `Fingerprint` what an artifact records of its base. Every reader validates all that it returns and raises a
`FormatError` that names file, tensor, found and expected, so no later code checks again. Only `torch_pickle` imports
torch, and only when it is called. A new file format gets a module here; a new version of one of ours, a number in its
module (`versions` says how older files stay readable). What becomes of the tensors is decided in `merging` and
`training`.
"""
