"""A Hugging Face hub on this machine, which huggingface_hub's own client talks to over HTTP.

It has the requests of `snapshot_download`: what commit a revision is, which files that has, and the
files. https://huggingface.co/docs/hub/api
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

COMMIT = "0123456789" * 4  # of every repository and branch


@contextlib.contextmanager
def serve_hub(folder: Path, cache: Path) -> Iterator[list[str]]:
    """Serve the repositories in `folder` while the context lasts, to clients in this process.

    Args:
        folder: has models/OWNER/NAME and datasets/OWNER/NAME. A repository with a file `gated` in it
            is refused.
        cache: the clients' cache, instead of the user's.

    Yields:
        The names of the files that have been sent, as they come.
    """
    sent: list[str] = []
    handler = type("Hub", (_Handler,), {"folder": folder, "sent": sent})
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # the next one reads that
        yield sent
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    folder: Path
    sent: list[str]

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer by the path: /api/models/OWNER/NAME/revision/main, or /OWNER/NAME/resolve/C/FILE."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_question = parts[0] == "api"
        kind = parts.pop(1) if is_question else "datasets" if parts[0] == "datasets" else "models"
        if parts[0] in ("api", "datasets"):
            parts.pop(0)
        repository, (what, _, *name) = self.folder / kind / parts[0] / parts[1], parts[2:]
        if not repository.is_dir():
            self.refuse(404, "RepoNotFound")
        elif (repository / "gated").exists():
            self.refuse(403, "GatedRepo")
        elif not is_question:
            self.send_file(repository, "/".join(name))
        elif what == "revision":
            self.send(json.dumps({"id": "/".join(parts[:2]), "sha": COMMIT}).encode())
        else:
            files = sorted(path for path in repository.rglob("*") if path.is_file())
            self.send(json.dumps([describe(path, repository) for path in files]).encode())

    def send_file(self, repository: Path, name: str) -> None:
        """Send a file of a repository."""
        path = repository / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.sent.append(name)
        self.send(path.read_bytes(), ETag=f'"{hash_content(path)}"')

    def send(self, body: bytes, **headers: str) -> None:
        """Send a body with its length, of the commit that all have."""
        self.send_response(200)
        for header, value in (headers | {"X-Repo-Commit": COMMIT}).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        """Refuse the request with the hub's own code for it."""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Write no line for each request."""


def describe(path: Path, repository: Path) -> dict:
    """Describe a file as the hub does; all are large ones, whose blobs are named by SHA-256."""
    size, sha256 = path.stat().st_size, hash_content(path)
    large = {"oid": sha256, "size": size, "pointerSize": 134}
    name = str(path.relative_to(repository))
    return {"type": "file", "path": name, "size": size, "oid": "0" * 40, "lfs": large}


def hash_content(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
