"""The fixture `hub`: a server, with the real client pointed to it in this process and its children."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http
from requests.adapters import HTTPAdapter

from .server import UNSET, Hub

PACKAGES = ("huggingface_hub", "transformers", "adapters", "datasets")
ADDRESSES = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HUGGINGFACE_CO_RESOLVE_ENDPOINT", "HUGGINGFACE_CO_PREFIX")
"""Constants read from the environment at import, as are the folders; all modules that hold a copy are patched."""
FOLDERS = {
    "HF_HOME": "", "hf_cache_home": "", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens",
    "HF_HUB_CACHE": "hub", "HUGGINGFACE_HUB_CACHE": "hub", "TRANSFORMERS_CACHE": "hub", "default_cache_path": "hub",
    "HF_ASSETS_CACHE": "assets", "HUGGINGFACE_ASSETS_CACHE": "assets", "HF_XET_CACHE": "xet",
    "HF_MODULES_CACHE": "modules",
}  # fmt: skip
"""Folders by constant, relative to HF_HOME."""

for _name in ("_commit_api", "_snapshot_download", "lfs", "repocard", "utils._cache_manager", "utils._git_credential"):
    import_module(f"huggingface_hub.{_name}")  # before the settings change: what is imported later would keep the new


class ClientHub(Hub):
    """A Hub with HF_HOME, the client's cache, and the seconds that the client would have waited before each retry."""

    home: Path
    cache: Path
    waits: list[float]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientHub]:
    """Start an empty Hub with the real client pointed to it; set HF_TOKEN to use a token."""
    server = ClientHub(tmp_path / "hub-contents")
    server.home, server.cache, server.waits = tmp_path / "hf-home", tmp_path / "hf-home" / "hub", []
    with server:
        _set_environment(server, monkeypatch)
        _set_constants(server, monkeypatch)
        _set_http(server, monkeypatch)
        yield server
        _http.reset_sessions()
    assert not server.crashes


def _set_environment(hub: ClientHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in hub.variables(hub.home).items():
        monkeypatch.setenv(name, value)


def _set_constants(hub: ClientHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for name, module in [*sys.modules.items()] if name.split(".", 1)[0] in PACKAGES]:
        known = vars(module)
        for name in (name for name in ADDRESSES if isinstance(known.get(name), str)):
            monkeypatch.setattr(module, name, re.sub(r"https?://[^/]+", hub.url, known[name]))
        for name in (name for name in FOLDERS if isinstance(known.get(name), str)):
            monkeypatch.setattr(module, name, str(hub.home / FOLDERS[name]))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setattr(constants, name, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Elsewhere(HTTPAdapter):
    """Redirects requests for huggingface.co, which `ModelCard.validate` hard-codes, to `hub`; refuses all others."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        super().__init__()

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        address = str(request.url)
        if not address.startswith("https://huggingface.co/"):
            raise requests.ConnectionError(f"no network in tests: {address}")
        request.url = address.replace("https://huggingface.co", self._hub.url, 1)
        return super().send(request, *args, **kwargs)


def _set_http(hub: ClientHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def sessions() -> requests.Session:
        session = _http._default_backend_factory()
        if not constants.HF_HUB_OFFLINE:
            session.mount("https://", _Elsewhere(hub))
        return session

    monkeypatch.setattr(_http, "_GLOBAL_BACKEND_FACTORY", sessions)
    clock = SimpleNamespace(sleep=hub.waits.append)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    monkeypatch.setattr("pema_adapters.hub.retry._sleep", hub.waits.append)
    _http.reset_sessions()
