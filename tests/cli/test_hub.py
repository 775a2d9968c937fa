"""Sources: local folders, and hub models through the real client against a stand-in hub on 127.0.0.1.

Each scenario runs in a fresh interpreter, since the client reads its environment when it is imported. There a guard
refuses every connection that would leave the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from mbx.formats.hub import select_files

SHA_1, SHA_2 = "1" * 40, "2" * 40
TOKEN = "hf_right"

FILES_1 = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"\x00sp",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_x.py": b"x = 1",
    "additional_chat_templates/rag.jinja": b"{{ docs }}",
    "model.safetensors": b"w" * 100_000,
    "pytorch_model.bin": b"p" * 999,
    "consolidated.safetensors": b"c" * 999,
    "original/model.safetensors": b"o" * 999,
    "README.md": b"# x",
}
WANTED = sorted(FILES_1.keys() - {
    "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "README.md"
})  # fmt: skip
WANTED_BYTES = sum(len(FILES_1[name]) for name in WANTED)
FILES_2 = {**FILES_1, "model.safetensors": b"v" * 50_000}


class Hub(ThreadingHTTPServer):
    """The parts of the hub's HTTP interface that a pinned download uses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {
            "org/tiny": {SHA_1: FILES_1, SHA_2: FILES_2},
            "org/bins": {SHA_1: {"config.json": b"{}", "pytorch_model.bin": b"p" * 10, "model.gguf": b"g"}},
            "org/gguf": {SHA_1: {"config.json": b"{}", "model-q4.gguf": b"g"}},
            "org/gated": {SHA_1: FILES_1},
            "org/pipeline": {
                SHA_1: {
                    "model_index.json": b"{}",
                    "flux1-dev.safetensors": b"f" * 999,
                    "transformer/config.json": b"{}",
                    "transformer/diffusion_pytorch_model.safetensors": b"w" * 999,
                }
            },
        }
        self.branches = {"main": SHA_1, "v1": SHA_1}
        self.status: int | None = None
        self.log: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path).strip("/")
        token = self.headers.get("Authorization")
        hub.log.append((self.command, path, token))
        if hub.status is not None:
            return self.reply(hub.status, b"{}")
        if token not in (None, f"Bearer {TOKEN}"):
            return self.reply(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in hub.repos:
            return self.reply(401 if token is None else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo == "org/gated" and token is None:
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        rest = parts[4:] if api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        sha = hub.branches.get(revision, revision)
        if sha not in hub.repos[repo]:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = hub.repos[repo][sha]
        if api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in files.items()]
            return self.reply(200, json.dumps(tree).encode())
        if api:
            return self.reply(200, json.dumps({"id": repo, "sha": sha, "siblings": []}).encode())
        name = "/".join(rest[2:])
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return self.reply(200, files[name], {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": sha})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PROGRAM = """
import json, socket, sys
real = socket.socket.connect
def guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "127.0.0.1":
        raise AssertionError(f"left the machine: {address}")
    return real(self, address)
socket.socket.connect = guarded

from mbx.formats import hub
assert "huggingface_hub" not in sys.modules and "torch" not in sys.modules
from converters.errors import MbxError

for line in sys.stdin:
    call = json.loads(line)
    seen = []
    if call.pop("progress", False):
        call["progress"] = lambda done, total: seen.append((done, total))
    try:
        answer = getattr(hub, call.pop("do"))(call.pop("source"), **call)
        if isinstance(answer, hub.LocalModel):
            files = {p.relative_to(answer.path).as_posix(): p.stat().st_size for p in answer.path.rglob("*") if p.is_file()}
            out = {"path": str(answer.path), "repo_id": answer.repo_id, "sha": answer.revision_sha, "files": files}
        else:
            out = {"sha": answer.revision_sha, "files": [[f.path, f.nbytes, f.cached] for f in answer.files],
                   "bytes": answer.download_bytes}
        out["progress"] = seen
    except MbxError as error:
        out = {"error": type(error).__name__, "code": error.exit_code, "fact": error.fact, "hint": error.hint,
               "details": error.details}
    print(json.dumps(out), flush=True)
"""  # noqa: E501


class Client:
    """One interpreter with its own hub client; `ask` runs one call in it."""

    def __init__(self, endpoint: str, cache: Path, **env: str) -> None:
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**keep, **settings, **env},
            cwd=Path(__file__).parents[2],
        )

    def ask(self, do: str, source: str, **options: object) -> dict:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.process.stdin.write(json.dumps({"do": do, "source": source, **options}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(self.process.stderr.read())
        return json.loads(line)

    def resolve(self, source: str, **options: object) -> dict:
        return self.ask("resolve", source, **options)

    def plan(self, source: str, **options: object) -> dict:
        return self.ask("plan_download", source, **options)


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Iterator:
    running: list[Client] = []

    def start(endpoint: str = hub.url, **env: str) -> Client:
        running.append(Client(endpoint, tmp_path / "home", **env))
        return running[-1]

    yield start
    for each in running:
        each.process.communicate()


def test_a_branch_is_pinned_to_the_commit_it_stands_at(hub: Hub, client, tmp_path: Path):
    ask = client()
    plan = ask.plan("org/tiny")
    assert plan["sha"] == SHA_1 and plan["bytes"] == WANTED_BYTES
    assert plan["files"] == [[name, len(FILES_1[name]), False] for name in WANTED]
    assert not any("/resolve/" in path for _, path, _ in hub.log), "a plan downloads nothing"

    first = ask.resolve("org/tiny", progress=True)
    assert (first["repo_id"], first["sha"]) == ("org/tiny", SHA_1)
    assert first["files"] == {name: len(FILES_1[name]) for name in WANTED}
    done = [d for d, _ in first["progress"]]
    assert done == sorted(done) and first["progress"][-1] == [WANTED_BYTES, WANTED_BYTES]
    fetched = [path for command, path, _ in hub.log if command == "GET" and "/resolve/" in path]
    assert sorted(fetched) == sorted(f"org/tiny/resolve/{SHA_1}/{name}" for name in WANTED), "by commit, each once"

    hub.branches["main"] = SHA_2
    second = ask.resolve("org/tiny")
    assert second["sha"] == SHA_2 and second["files"]["model.safetensors"] == 50_000
    assert Path(first["path"], "model.safetensors").read_bytes() == FILES_1["model.safetensors"]

    for pinned in (ask.resolve(f"org/tiny@{SHA_1}"), ask.resolve("org/tiny", revision=SHA_1)):
        assert pinned["path"] == first["path"] and pinned["sha"] == SHA_1
    assert ask.resolve("org/tiny@v1")["sha"] == SHA_1
    before = len(hub.log)
    assert all(cached for _, _, cached in ask.plan(f"org/tiny@{SHA_1}")["files"])
    ask.resolve(f"org/tiny@{SHA_1}")
    assert len(hub.log) == before, "a complete pinned commit needs no request"


def test_without_weights_only_the_side_files_come(client):
    files = client().resolve("org/tiny", weights=False)["files"]
    assert sorted(files) == sorted(set(WANTED) - {"model.safetensors"})


def test_bin_weights_only_where_there_are_no_safetensors(client):
    ask = client()
    assert sorted(ask.resolve("org/bins")["files"]) == ["config.json", "pytorch_model.bin"]
    none = ask.resolve("org/gguf")
    assert none["error"] == "StorageError" and "no weights" in none["fact"]
    assert none["details"] == ["config.json", "model-q4.gguf"]


def test_a_pipeline_of_diffusers_says_what_to_download(client):
    """Its files at the top are another program's, and its transformer lies a folder down."""
    found = client().resolve("org/pipeline")
    assert "pipeline of diffusers" in found["fact"]
    assert "hf download org/pipeline --include 'transformer*/*'" in found["hint"]


def test_offline_uses_the_cache_and_nothing_else(hub: Hub, client, tmp_path: Path):
    online = client()
    pinned = online.resolve("org/tiny", weights=False)
    before = len(hub.log)
    offline = client(HF_HUB_OFFLINE="1")
    assert offline.resolve("org/tiny", weights=False)["path"] == pinned["path"]
    for source in ("org/tiny", "org/never", f"org/never@{SHA_1}"):
        error = offline.resolve(source)
        assert (error["error"], error["code"]) == ("StorageError", 4)
        assert "not in the cache" in error["fact"] and "HF_HUB_OFFLINE" in error["hint"]
    assert offline.plan("org/never")["error"] == "StorageError"
    assert len(hub.log) == before
    online.resolve("org/tiny")
    assert offline.resolve("org/tiny")["files"] == {name: len(FILES_1[name]) for name in WANTED}


def test_offline_with_a_cache_that_has_no_listing_misses_no_shard(hub: Hub, client, tmp_path: Path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    hub.repos["org/tiny"][SHA_1] = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
    }
    folder = Path(client().resolve("org/tiny")["path"])
    for listing in tmp_path.rglob("trees/*.json"):
        listing.unlink()
    assert sorted(client(HF_HUB_OFFLINE="1").resolve("org/tiny")["files"]) == sorted(hub.repos["org/tiny"][SHA_1])
    (folder / "model-2.safetensors").unlink()
    error = client(HF_HUB_OFFLINE="1").resolve("org/tiny")
    assert "1 of 2 shards" in error["fact"] and error["details"] == ["model-2.safetensors"]


def test_offline_with_the_config_alone_says_what_was_never_downloaded(hub: Hub, client, tmp_path: Path):
    """A job that only loaded the tokenizer: the repository is fine, the cache has no weights of it."""
    client().resolve("org/tiny", weights=False)
    offline = client(HF_HUB_OFFLINE="1")
    error = offline.resolve("org/tiny")
    assert "1 of the 8 files" in error["fact"] and error["details"] == ["model.safetensors"]
    assert "hf download org/tiny" in error["hint"]
    for listing in tmp_path.rglob("trees/*.json"):
        listing.unlink()
    error = client(HF_HUB_OFFLINE="1").resolve("org/tiny")
    assert error["code"] == 4 and "its weights were never downloaded" in error["fact"]
    assert "`config.json`" in error["fact"] and "hf download org/tiny" in error["hint"]
    assert "other formats" not in error["hint"] and "original weights" not in error["hint"]


def test_tokens_and_refusals(hub: Hub, client):
    right = client(HF_TOKEN=TOKEN)
    assert right.resolve("org/gated", weights=False)["sha"] == SHA_1
    assert {token for _, _, token in hub.log} == {f"Bearer {TOKEN}"}
    assert "no revision `v9`" in right.resolve("org/tiny@v9")["fact"]
    assert "no model `org/missing`" in right.resolve("org/missing")["fact"]

    wrong = client(HF_TOKEN="hf_wrong").resolve("org/tiny")
    assert (wrong["error"], wrong["code"]) == ("StorageError", 4)
    assert "refused the token" in wrong["fact"] and "401" in wrong["fact"] and "HF_TOKEN" in wrong["hint"]

    nobody = client()
    gated = nobody.resolve("org/gated")
    assert gated["code"] == 4 and "gated" in gated["fact"] and f"{hub.url}/org/gated" in gated["hint"]
    missing = nobody.plan("org/missing")
    assert missing["code"] == 4 and "no model `org/missing`" in missing["fact"] and "HF_TOKEN" in missing["hint"]
    hub.status = 418
    assert "HTTP 418" in nobody.resolve("org/tiny")["fact"]


def test_an_unreachable_hub_is_said_so(client):
    error = client("http://127.0.0.1:9").resolve("org/tiny")
    assert (error["error"], error["code"]) == ("StorageError", 4)
    assert "http://127.0.0.1:9 cannot be reached" in error["fact"] and "HF_ENDPOINT" in error["hint"]


def test_a_failing_hub_leaves_the_commit_last_seen(hub: Hub, client):
    hub.status = 500
    error = client().resolve("org/tiny")
    assert (
        error["code"] == 4 and "cannot be reached" in error["fact"] and any("500" in line for line in error["details"])
    )
    hub.status = None
    seen = client().resolve("org/tiny")
    hub.status = 500
    assert client().resolve("org/tiny")["path"] == seen["path"]


def test_paths_never_reach_the_hub(hub: Hub, client, tmp_path: Path):
    ask = client()
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    assert ask.resolve(str(folder)) == {
        "path": str(folder), "repo_id": None, "sha": None, "files": {}, "progress": [],
    }  # fmt: skip
    assert ask.plan(str(folder))["files"] == []
    assert ask.resolve("tests/cli")["repo_id"] is None, "an existing path wins over a repo of that name"
    for missing in (
        "./org/tiny",
        "/org/tiny",
        "~/org-tiny",
        "org/tiny/sub",
        "../x/y",
        "tiny",
        "",
        "org/",
        "a b/c",
        "a//b",
    ):
        error = ask.resolve(missing)
        assert (error["error"], error["code"]) == ("StorageError", 4)
        assert error["fact"] == f"no such folder: `{missing}`"
    for source, options in (
        ("org/tiny@v1", {"revision": "main"}),
        ("org/tiny@", {}),
        (str(folder), {"revision": "v1"}),
    ):
        assert ask.resolve(source, **options)["code"] == 2
    assert hub.log == []


def test_the_guard_of_these_tests_does_refuse(client):
    """Negative control: an endpoint elsewhere is not contacted."""
    ask = client("http://192.0.2.1:80")
    ask.process.stdin.write(json.dumps({"do": "resolve", "source": "org/tiny"}) + "\n")
    ask.process.stdin.flush()
    assert ask.process.stdout.readline() == ""
    assert "left the machine: ('192.0.2.1', 80)" in ask.process.stderr.read()


def test_select_files_prefers_the_split_weights():
    names = ["consolidated.safetensors", "model-00001-of-00002.safetensors", "mtp.safetensors", "params.json"]
    assert select_files(dict.fromkeys(names, 1), weights=True) == names[1:]
    assert select_files({"consolidated.safetensors": 1}, weights=True) == ["consolidated.safetensors"]
    assert select_files(dict.fromkeys(names, 1), weights=False) == ["params.json"]
