"""A local Hub for the real client: `Hub` is the server, and the module `fixture` points the client to it."""

from .answers import Account, Refusal
from .server import Hub

__all__ = ["Account", "Hub", "Refusal"]
