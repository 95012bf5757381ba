"""Answers of the server, and refusals with the texts and codes of the real Hub."""

import json
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Account:
    """The account of a token. With `write` it may write to its own namespace and those of its orgs."""

    user: str
    orgs: tuple[str, ...] = ()
    write: bool = True
    granted: tuple[str, ...] = ()
    """Gated repositories of others to which it has access."""

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/", maxsplit=1)[0] in (self.user, *self.orgs)


@dataclass
class Answer:
    """An answer. Its body is bytes, or a range of a file that is streamed."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int | None = None

    @classmethod
    def of(cls, value: object, status: int = 200, **headers: str) -> "Answer":
        """Return an answer in JSON; `X_Repo_Commit="..."` becomes the header X-Repo-Commit."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **named})

    @property
    def size(self) -> int:
        return len(self.body) if self.file is None else int(self.length or 0)


class Refusal(Exception):
    """An error as answer. The client chooses its exception by `code`, the header X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(f"{status} {message}")
        self.answer = Answer.of({"error": message}, status, X_Error_Message=message, **headers)
        if code:
            self.answer.headers["X-Error-Code"] = code


class Dropped(Exception):
    """Raised to cut the connection without an answer."""


def wrong_token() -> Refusal:
    """Return the Hub's answer to an unknown token, given for public repositories too."""
    return Refusal(401, "Invalid credentials in Authorization header")


def not_logged_in(*, repository: bool = True) -> Refusal:
    """Return the answer without login. The real Hub sends no code, and its client goes by an https:// address instead."""
    return Refusal(401, "Invalid username or password.", "RepoNotFound" if repository else None)


def no_repository() -> Refusal:
    return Refusal(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(commit: str, message: str = "Entry not found") -> Refusal:
    return Refusal(404, message, "EntryNotFound", X_Repo_Commit=commit)


def gated(repo_id: str, account: Account | None) -> Refusal:
    if account is None:
        more = "You must have access to it and be authenticated to access it. Please log in."
        return Refusal(401, f"Access to model {repo_id} is restricted. {more}", "GatedRepo")
    more = f"Visit https://huggingface.co/{repo_id} to ask for access."
    text = f"Access to model {repo_id} is restricted and you are not in the authorized list. {more}"
    return Refusal(403, text, "GatedRepo")


def no_rights(repo_id: str) -> Refusal:
    space = repo_id.split("/", maxsplit=1)[0]
    return Refusal(403, f'You don\'t have the rights to create a model under the namespace "{space}"')


QUOTA = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
"""The real Hub's text at status 403, for the LFS batch and the commit: `hub.fail("POST .*/batch", status=403, message=QUOTA)`."""
