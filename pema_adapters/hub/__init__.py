"""Access to the Hugging Face Hub: downloads, retries, errors, model cards, and configs of pretrained models.

`download_base` and `download_delta` return a local snapshot of one commit; `with_retry` repeats a request that may
succeed later; `explain` turns any error of the client into one line with advice; `render_card` adds our section to a
model card. huggingface_hub is imported inside the functions that need it, so that merging local folders does not load
it. A new kind of download gets a selection of files in `download`, a new error a row in `errors`. Uploads are in
`publishing`.
"""
