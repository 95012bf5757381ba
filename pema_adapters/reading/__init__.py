"""What `scan.py` stands on: one module a kind of data. None imports a library that did not make the data."""
