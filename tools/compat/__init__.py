"""PEMA with every model type and method of adapters, trained, saved, exported and loaded."""
