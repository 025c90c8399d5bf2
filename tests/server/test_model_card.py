"""The model card of an export tells what it is, from which base, and how it scores."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import yaml

from fedllm.errors import ConfigError, RunFailed
from fedllm.server.hub_upload import push_folder, require_repository
from fedllm.server.model_card import CardFacts, model_card
from tests.reporting.runs import evaluation


def facts(**changes: object) -> CardFacts:
    given: dict[str, object] = {
        "base_model": "owner/base",
        "method": "flexlora + fedit",
        "round": 3,
        "ranks": {"a": 4, "b": 8},
        "clients": 12,
        "rows": 1200,
        "merged": False,
        "base": evaluation(0, {"a": 4.0, "d": 6.0}),
        "scores": evaluation(3, {"a": 1.0, "d": 3.0}),
    }
    return CardFacts(**{**given, **changes})  # type: ignore[arg-type]


def fields(card: str) -> dict[str, object]:
    """Return the fields that the hub reads."""
    found: dict[str, object] = yaml.safe_load(card.split("---")[1])
    return found


def test_the_hub_finds_base_library_and_task() -> None:
    assert fields(model_card(facts())) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "federated-learning", "fedllm"],
    }
    merged = fields(model_card(facts(merged=True, base_model="/models/base")))
    assert "base_model" not in merged
    assert merged["library_name"] == "transformers"


def test_the_card_has_the_scores_of_each_group_apart() -> None:
    card = model_card(facts())
    assert "| dev clients | 1 | 6.000 -> 3.000 | 0.600 -> 0.300 | 0.500 -> 0.500 |" in card
    assert "| training clients | 1 | 4.000 -> 1.000 |" in card
    assert "- Adapter: ranks 4 to 8 in 2 modules" in card
    assert "- Data: 12 clients with 1,200 training rows" in card
    assert "## Scores" not in model_card(facts(scores=None))


@pytest.mark.parametrize("merged", [False, True])
def test_the_code_of_the_card_is_python(merged: bool) -> None:
    card = model_card(facts(merged=merged))
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("PeftModel" in code) is not merged


def test_a_name_without_an_owner_is_refused_before_anything_is_written() -> None:
    for name in ("base", "a/b/c", "a b/c", ""):
        with pytest.raises(ConfigError, match="need OWNER/NAME"):
            require_repository(name)
    require_repository("owner/name")


class _Hub(BaseHTTPRequestHandler):
    """A hub that takes a repository and its files, as far as the hub's client asks."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[dict[str, object]]] = []

    def do_POST(self) -> None:
        assert self.headers["authorization"] == "Bearer hf_secret"
        body = self.rfile.read(int(self.headers["content-length"]))
        answer: dict[str, object] = {}
        if self.path == "/api/repos/create":
            self.asked.append(json.loads(body))
            answer["url"] = f"http://{self.headers['host']}/o/n"
        elif self.path.endswith("/preupload/main"):
            answer["files"] = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
        elif self.path.endswith("/commit/main"):
            self._keep(body)
            place = f"http://{self.headers['host']}/o/n/commit/c"
            answer |= {"commitOid": "c", "commitUrl": place, "hookOutput": ""}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _keep(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        """Write no log."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_an_export_is_uploaded_into_a_private_repository(
    hub: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    assert push_folder("o/n", exported).endswith("o/n")
    assert _Hub.asked == [{"name": "n", "organization": "o", "visibility": "private"}]
    assert _Hub.files == {file.name: file.read_bytes() for file in exported.iterdir()}


@pytest.mark.parametrize(("token", "offline"), [("", True), ("", False), ("hf_secret", False)])
def test_a_hub_that_does_not_answer_leaves_the_folder_and_a_remedy(
    token: str, offline: bool, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailed, match=r"--push-to-hub: o/n: .*is complete; once the hub") as met:
        push_folder("o/n", exported)
    assert len(str(met.value).splitlines()) == 1
