"""Mutated bases and deltas, and an oracle for their merges."""
