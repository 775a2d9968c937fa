"""Folders go to the hub whole, private, with a card of what the manifest says and what was proven."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from _cli import Run

from fixtures.make_tiny import make
from mbx.run.share import push


class FakeHub:
    """What the client is asked for; `refuse` ends the upload of files as a lost connection does."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.files: dict[str, set[str]] = {}
        self.cards: dict[str, str] = {}
        self.refuse = False
        self.public: set[str] = set()
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if self.error is not None:
            raise self.error
        self.made.append((repo_id, private))
        if not private and repo_id not in self.files:
            self.public.add(repo_id)
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id: str) -> SimpleNamespace:
        names = [SimpleNamespace(rfilename=name) for name in self.files.get(repo_id, ())]
        return SimpleNamespace(private=repo_id not in self.public, siblings=names)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        if self.refuse:
            raise ConnectionResetError("the line went dead")
        self.files[repo_id] = {p.name for p in folder_path.iterdir()} & set(allow_patterns)

    def upload_file(self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str, commit_message: str) -> None:
        assert path_in_repo == "README.md"
        self.cards[repo_id] = path_or_fileobj.decode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    for name in ("create_repo", "model_info", "upload_folder", "upload_file"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, staticmethod(call_of(fake, name)))
    return fake


def call_of(fake: FakeHub, name: str) -> Callable[..., object]:
    return lambda *arguments, **options: getattr(fake, name)(*arguments, **options)


@pytest.fixture
def ckpt(mbx: Run, here: Path) -> Path:
    make("llama", here / "base")
    assert mbx("convert", "hf-to-mcore", "base", "ckpt").code == 0
    return here / "ckpt"


def test_a_conversion_is_proven_then_pushed_private_with_its_card(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    said = mbx("convert", "mcore-to-hf", ckpt, "back", "--push", "acme/tiny")
    assert said.code == 0 and "https://huggingface.co/acme/tiny" in said.stderr
    assert hub.made == [("acme/tiny", True)]
    assert hub.files["acme/tiny"] == {path.name for path in Path("back").iterdir()}
    card, manifest = hub.cards["acme/tiny"], json.loads(Path("back/mbx_manifest.json").read_text())
    assert manifest["table"]["sha256"] in card and f"{len(manifest['tensors'])} tensors" in card
    assert "`mbx verify parity`, weights: passed" in card and str(ckpt.parent) not in card


def test_what_is_not_the_checkpoint_is_not_pushed(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    assert mbx("convert", "mcore-to-hf", ckpt, "back").code == 0
    weights = Path("back/model.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 64
    weights.write_bytes(raw)
    said = mbx("push", "back", "acme/tiny", "--source", ckpt)
    assert said.code == 4 and "was not uploaded: weights" in said.stderr and hub.made == []


def test_an_interrupted_upload_names_the_command_that_goes_on(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    hub.refuse = True
    said = mbx("convert", "mcore-to-hf", ckpt, "back", "--push", "acme/tiny", "--public")
    again = ["push", "back", "acme/tiny", "--public", "--source", str(ckpt)]
    assert said.code == 4 and f"`mbx {' '.join(again)}` goes on" in said.stderr
    assert Path("back/model.safetensors").exists() and "download" not in said.stderr
    hub.refuse = False
    assert mbx(*again).code == 0 and hub.made == [("acme/tiny", False)] * 2
    assert "`mbx verify parity`, weights: passed" in hub.cards["acme/tiny"]


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "acme/", "acme/tiny@v1", "acme/my model", "acme/a..b", "acme/x.git"]
)
def test_a_name_that_no_repository_has_is_refused_first(mbx: Run, hub: FakeHub, ckpt: Path, name: str) -> None:
    said = mbx("convert", "mcore-to-hf", ckpt, "back", "--push", name)
    assert said.code == 2 and "org/name" in said.stderr and not Path("back").exists()


def test_a_repository_that_anybody_may_read_is_not_pushed_to_unasked(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    hub.files["acme/tiny"], hub.public = {"README.md"}, {"acme/tiny"}
    said = mbx("convert", "mcore-to-hf", ckpt, "back", "--push", "acme/tiny")
    assert said.code == 2 and "anybody may read it: nothing was uploaded" in said.stderr and "--public" in said.stderr
    assert hub.files["acme/tiny"] == {"README.md"} and hub.cards == {}
    assert mbx("push", "back", "acme/tiny", "--public").code == 0 and "acme/tiny" in hub.cards


def test_weights_of_another_cutting_are_not_mixed(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    hub.files["acme/tiny"] = {"config.json", "model-00001-of-00002.safetensors", "onnx/model.bin"}
    said = mbx("convert", "mcore-to-hf", ckpt, "back", "--push", "acme/tiny")
    assert said.code == 2 and "model-00001-of-00002.safetensors" in said.stderr and "delete them there" in said.stderr
    assert len(hub.files["acme/tiny"]) == 3 and "onnx" not in said.stderr
    hub.files["acme/tiny"] = {"config.json", "model.safetensors"}  # an earlier push of the same
    assert mbx("push", "back", "acme/tiny").code == 0


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_said_so(mbx: Run, hub: FakeHub, ckpt: Path, status: int) -> None:
    answer = SimpleNamespace(status_code=status, headers={}, request=None)
    hub.error = huggingface_hub.errors.HfHubHTTPError("You don't have the rights", response=answer)  # type: ignore[arg-type]
    said = mbx("convert", "mcore-to-hf", ckpt, "back", "--push", "acme/tiny")
    assert said.code == 4 and f"HTTP {status}" in said.stderr and "may write to acme" in said.stderr
    assert "mbx push back acme/tiny" in said.stderr and "download" not in said.stderr


def test_what_mbx_wrote_goes_as_it_wrote_it_and_nothing_else(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    assert mbx("convert", "mcore-to-hf", ckpt, "back").code == 0
    Path("back/.env").write_text("TOKEN=1")
    said = mbx("push", "back", "acme/tiny")
    assert said.code == 0 and "not uploaded, as mbx did not write it: .env" in said.stderr
    assert {"model.safetensors", "config.json", "mbx_manifest.json"} <= hub.files.pop("acme/tiny") - {".env"}
    assert "`mbx verify integrity`: passed" in hub.cards.pop("acme/tiny")
    config = Path("back/config.json")
    config.write_text(config.read_text().replace("251", "252"))
    said = mbx("push", "back", "acme/tiny")
    assert said.code == 4 and "is not as it was written, and was not uploaded: `config.json`" in said.stderr
    assert "mbx verify integrity back" in said.stderr and hub.files == {}


def test_only_finished_folders_are_pushed(mbx: Run, hub: FakeHub, ckpt: Path, here: Path) -> None:
    assert "hf upload" in mbx("push", "base", "acme/tiny").stderr
    assert "no Hugging Face folder" in mbx("push", "ckpt", "acme/tiny").stderr
    assert hub.made == []


def test_a_models_own_card_is_kept_above(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    shutil.rmtree(ckpt)
    Path("base/README.md").write_text("---\nlicense: mit\n---\n\n# Tiny\n")
    assert mbx("convert", "hf-to-mcore", "base", "ckpt").code == 0
    assert mbx("convert", "mcore-to-hf", "ckpt", "back", "--push", "acme/tiny").code == 0
    card = hub.cards["acme/tiny"]
    assert card.startswith("---\nlicense: mit\n---\n\n# Tiny\n") and "## How this folder was made" in card


def test_names_of_a_stranger_are_data_in_the_card(mbx: Run, hub: FakeHub, ckpt: Path) -> None:
    assert mbx("convert", "mcore-to-hf", ckpt, "back").code == 0
    manifest = json.loads(Path("back/mbx_manifest.json").read_text())
    name = "x`\n# Forged\n<img src=x>[here](http://example.org)"
    manifest |= {
        "waived": {"unused": [name], name: ["y"]},
        "source": {"repo_id": name},
        "mbx": name,
        "direction": "merge",
    }
    manifest["table"] = {"name": name, "sha256": name}
    next(iter(manifest["tensors"].values()))["dtype"] = name
    Path("back/mbx_manifest.json").write_text(json.dumps(manifest))
    push(Path("back"), "acme/tiny")
    card = hub.cards["acme/tiny"]
    assert card.count("Forged") == 7 and not any(line.startswith("# Forged") for line in card.splitlines())
    assert "<img" not in card and "](http" not in card and "- table: `x'\\n# Forged" in card
