"""The command line: `pema-merge` and `pema-scan`. Each parses, calls one function, prints."""
