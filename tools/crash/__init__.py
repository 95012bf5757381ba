"""Merges that are killed, or whose system calls fail."""
