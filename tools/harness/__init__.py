"""What all tools share: timing, child processes, result files, tables."""
