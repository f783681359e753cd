"""`svdq push` against a stand-in for the hub on this machine: what it is asked for, and what is refused before."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from svdq_cli.cli import run

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits as the hub's API does. Files come inline: the stand-in asks for no LFS."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            return self._answer({"error": "Invalid username or password."}, status=401)
        if self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            return self._answer({"url": f"{self.server.url}/someone/model", "id": "someone/model"})
        if self.path == "/api/validate-yaml":  # the card's header
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            found = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": found})
        for line in body.splitlines():  # /commit/: one JSON object a line
            item = json.loads(line)
            if item["key"] == "file":
                self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        url = f"{self.server.url}/someone/model/commit/{COMMIT}"
        return self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self) -> None:
        self._answer({"id": "someone/model", "sha": COMMIT, "siblings": []})

    def _answer(self, content: object, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def pushed(hub: Hub, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its address when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    return subprocess.run(
        [sys.executable, "-m", "svdq_cli", "push", *words, "--json"],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_folder_is_uploaded_in_one_commit_without_its_report(
    converted_flux: Callable[[str], Path], hub: Hub
):
    folder = converted_flux("int4") / "lite"
    done = pushed(hub, str(folder), "someone/model", "--private")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    (repository,) = hub.repositories
    assert repository["name"] == "model"
    # the client's words before 2.0, and now
    assert repository.get("private") or repository["visibility"] == "private"
    assert hub.files.keys() == {file["path"] for file in report["files"]}
    assert {"README.md", "model_index.json", "transformer/config.json"} <= hub.files.keys()
    assert "svdq_report.json" not in hub.files
    card = hub.files.pop("README.md").decode()
    assert all(content == (folder / name).read_bytes() for name, content in hub.files.items())
    # there its code loads the repository
    assert 'DiffusionPipeline.from_pretrained("someone/model", dtype=torch.bfloat16)' in card
    assert card.replace("someone/model", ".") == (folder / "README.md").read_text()
    assert report["url"].endswith(COMMIT)


def test_a_hub_that_refuses_is_exit_code_4(converted_flux: Callable[[str], Path], hub: Hub):
    hub.refuses = True
    done = pushed(hub, str(converted_flux("int4") / "comfy.safetensors"), "someone/model")
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "hub"
    assert "hf auth login" in error["hint"]
    assert "Traceback" not in done.stderr


def test_a_dry_run_lists_a_file_with_its_card_and_asks_nobody(
    converted_flux: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    file = converted_flux("int4") / "comfy.safetensors"
    assert run(["push", str(file), "someone/model", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["status"], report["url"]) == ("planned", None)
    assert [file["path"] for file in report["files"]] == ["comfy.safetensors", "README.md"]
    assert report["bytes"] > file.stat().st_size


@pytest.mark.parametrize("repository", ["model", "a/b/c", "../x", "someone/", "http://a/b"])
def test_what_is_no_repository_is_bad_usage(
    repository: str, converted_flux: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    assert run(["push", str(converted_flux("int4") / "lite"), repository, "--dry-run", "--json"]) == 2
    assert "owner/name" in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_a_checkpoint_that_fails_its_check_is_not_pushed(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(converted_flux("int4") / "lite", copy)
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.weight"] *= float("nan")
    save_file(tensors, weights)
    assert run(["push", str(copy), "someone/model", "--dry-run", "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["error"]["where"] == str(copy)


def test_a_checkpoint_that_missed_its_gates_is_not_pushed(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(converted_flux("int4") / "lite", copy)
    report = json.loads((copy / "svdq_report.json").read_text())
    (copy / "svdq_report.json").write_text(json.dumps({**report, "gates_missed": ["psnr_db >= 20 (is 3)"]}))
    assert run(["push", str(copy), "someone/model", "--dry-run", "--json"]) == 6
    assert "psnr_db >= 20" in json.loads(capsys.readouterr().out)["error"]["message"]
