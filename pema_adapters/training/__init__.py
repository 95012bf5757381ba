"""The half that trains: torch, Transformers and adapters. It shares nothing with the merging half but `formats`."""
