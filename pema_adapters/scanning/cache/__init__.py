"""Reuse the scans of `pema-scan`: results for the same data and tokenizer, and the state of interrupted scans.

`cached_scan.scan_with_cache` computes a key of the data (a `cached_scan.DataSource`) and of the tokenizer with
`content_key`, and looks it up in a `scan_store.ScanStore`. Data and tokenizers without a key (streams, classes
outside of transformers) are scanned every time. The key must cover everything on which a result depends: add a new
setting to `cached_scan._open_scan_store`, a new data source to `DataSource._compute_name_key`, and raise
`cached_scan.FORMAT` when the meaning of a scan changes. `pema-scan` also stores whole answers, so that the same command
on local files loads none of the large libraries; `cached_scan.open_cache` is the folder of both.
"""
