"""Find the token ids that data use: one pass, one bit per embedding row.

`scanner.scan` reads tokenized data of any kind. `text_scanner.scan_text` tokenizes text first; `text_columns.Encoder`
says how. Both mark ids in a `bitmap.Bitmap` and return a `scanner.Scan`. A new file format is one entry of
`data_files.BUILDERS`, with a check in `limits` if a small file can expand without bound. A new kind of data set is one
branch of `scanner.Scanner.scan_any` that calls `scan_row` or `scan_table`; its steps must come in the same order in
every run, because `progress.ScanProgress` counts them to resume. New types of values belong in `values`, Arrow types in
`arrow`. A faster way to tokenize belongs in `tokenization.choose_tokenizer`, which compares it with the tokenizer's own
call.
"""
