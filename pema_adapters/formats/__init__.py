"""What lies on disk: checkpoints, artifacts, fingerprints. Files and bytes; no torch."""
