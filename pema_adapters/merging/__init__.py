"""Base checkpoint + delta -> full checkpoint, as a plan of byte segments. Files and bytes; no torch."""
