"""Data sets by their hub id, through the real `datasets` library against a stand-in hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from _trainings import QWEN3

pytest.importorskip("datasets")

SHA = "1" * 40


def lines(*texts: str) -> bytes:
    chats = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": text}] for text in texts]
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in chats).encode()


#: One data set of two splits.
FILES = {"train.jsonl": lines("one", "two", "three"), "test.jsonl": lines("four")}


class _Handler(BaseHTTPRequestHandler):
    """The parts of the hub's HTTP interface that reading a data set uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        paths = json.loads(asked)["paths"] if asked[:1] == b"{" else []
        self.reply(200, json.dumps([entry for entry in _entries() if entry["path"] in paths]).encode())

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/datasets/org/chats"):
            tree = "/tree/" in path
            about = {"id": "org/chats", "sha": SHA, "siblings": [{"rfilename": name} for name in FILES], "tags": []}
            return self.reply(200, json.dumps(_entries() if tree else about).encode())
        name = path.rpartition("/")[2]
        if path.startswith("datasets/org/chats/resolve/") and name in FILES:
            content = FILES[name]
            return self.reply(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": SHA})
        code = "EntryNotFound" if path.startswith("datasets/org/chats/") else "RepoNotFound"
        return self.reply(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": SHA})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entries() -> list[dict[str, object]]:
    return [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in FILES.items()]


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import sys
from mbx.cli import main
for data in sys.argv[1:]:
    words = [f"model={QWEN3}", f"data={data}", "data.length=64", "data.pack=false", "run.device=cpu", "run.dir=run"]
    print(main(["train", "--recipe", "qwen3_0_6b_sft", *words, "--dry-run", "--json"]), "is the exit code")
"""


def dry(endpoint: str, folder: Path, *data: str) -> list[tuple[str, int]]:
    """What dry runs on each of `data` print, and their exit codes; one process has them all: the Hub's address is read
    where its library is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{QWEN3}", str(QWEN3)), *data],
        cwd=folder,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            **{"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "MBX_CACHE_DIR": str(folder / "cache")},
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"(.*?)^(\d+) is the exit code\n", done.stdout, re.DOTALL | re.MULTILINE)
    return [(printed, int(code)) for printed, code in said]


def test_a_hub_id_names_a_split_of_a_data_set(endpoint: str, tmp_path: Path) -> None:
    names = ("org/chats", '{"org/chats"=1,"org/chats:test"=1}', "org/none")
    (one, zero), (two, nought), (none, failed) = dry(endpoint, tmp_path, *names)
    assert (zero, nought) == (0, 0)
    found = json.loads(one)["data"]
    assert (found["examples"], found["rows"], found["shape"]) == (3, 3, "chats of `messages`")
    mixed = json.loads(two)["data"]["mixture"]
    assert [(part["place"], part["rows"]) for part in mixed] == [("org/chats", 3), ("org/chats:test", 1)]
    assert failed != 0 and "no data set that `datasets` can load" in none
