"""The versions of the formats that this package writes: files of older ones stay readable, newer ones are named."""

from pema_adapters.errors import FormatError

UNVERSIONED = 1
"""The version of files that say none: they were written before formats had versions."""


def check_version(found: object, newest: int, where: str = "") -> None:
    """Refuse a file whose version this package cannot read.

    Args:
        found: the version in the file, `UNVERSIONED` where there is none.
        newest: the newest version that can be read.
        where: what the message begins with, "FILE: " unless the caller adds the name of the file.

    Raises:
        FormatError: `found` is newer, or no version at all.
    """
    if type(found) is not int or found < 1:
        raise FormatError(f"{where}its version is {str(found)[:40]!r}, expected a number from 1; the file is damaged")
    if found > newest:
        raise FormatError(
            f"{where}written by a newer version of pema_adapters (format {found}, this one reads up to {newest}): "
            "upgrade it"
        )
