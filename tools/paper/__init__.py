"""The PEMA paper's tables: figures, models and data."""
