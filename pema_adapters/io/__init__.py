"""Operating-system services shared by all packages: files, locks, signals, progress, and safe text.

`InputFile` holds an input open and refuses it once it has changed; `replace_file` writes atomically; `hold_lock` keeps
two processes off one checkpoint; `CacheFolder` stores checksummed entries; `ProgressBar` wraps tqdm; the functions of
`escaping` make untrusted text printable. Nothing here knows about tensors, adapters or the Hub, and only numpy's byte
views are used. Add a module for each new service; keep what concerns a file format in `formats`.
"""
