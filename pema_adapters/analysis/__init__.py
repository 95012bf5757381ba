"""Predict what PEMA saves, before any training.

`memory_report.memory_report` counts the parameters of a model on the meta device and returns a `MemoryReport` of the
bytes saved; `heaps_law.fit_heaps_law` fits the vocabulary growth of a `scanning.scanner.Scan`, and
`heaps_law.render_figure` plots it. Nothing here loads weights or changes a model. A new optimizer is one entry of
`memory_report.OPTIMIZERS`; figures take any format of matplotlib.
"""
