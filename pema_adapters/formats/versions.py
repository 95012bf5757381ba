"""Versions of the formats that this package writes: older files stay readable, newer ones are refused by name."""

from pema_adapters.errors import FormatError

UNVERSIONED = 1
"""The version of files without a version, which were written before formats had versions."""


def check_version(found: object, newest: int, where: str = "") -> None:
    """Check that this package can read a version of a format.

    Args:
        found: The version in the file, `UNVERSIONED` if there is none.
        newest: The newest version that can be read.
        where: The start of the message, "FILE: " unless the caller adds the name of the file.

    Raises:
        FormatError: `found` is newer, or not a version.
    """
    if type(found) is not int or found < 1:
        raise FormatError(f"{where}its version is {str(found)[:40]!r}, expected 1 or more; the file is damaged")
    if found > newest:
        raise FormatError(
            f"{where}written by a newer version of pema_adapters (format {found}, this one reads up to {newest}); "
            "upgrade pema-adapters"
        )
