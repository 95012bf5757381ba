"""From a plan to changes of the base's own files, with an undo journal.

`change_set` finds the bytes to overwrite, `undo_journal` and `undo_data` save them first, `execute` changes the base,
`rollback` restores it. The journal's format has a version; older ones must stay readable.
"""
