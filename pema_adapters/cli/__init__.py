"""The command line: `pema-merge` and `pema-scan`.

Each command is a module with a `main` that parses the arguments, calls one function of the library and prints the
result; `_common` runs it, and turns errors into one line and an exit code (0 done, 1 refused or failed, 2 wrong usage).
The text that is printed is made in `_merge_format` and `_scan_format`: wording and layout change there. Arguments, JSON
keys and exit codes are a public contract. Slow imports (torch, transformers) stay inside functions, so that `--help`
does not load them.
"""
