"""hf:// names: what is asked of the hub, what a failure says, and what the cache gives without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coterie.cli import main
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.hub import resolve
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import save_model

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    calls: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path / "models--org--name" / "snapshots" / "0123abcd")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_path_is_itself(asked: list[Any], tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve("runs/model") == Path("runs/model")
    assert not asked


@pytest.mark.parametrize(
    ("model", "repo", "revision"),
    [
        ("hf://org/name", "org/name", None),
        ("hf://org/Name-1.5_b@v1.0", "org/Name-1.5_b", "v1.0"),
        ("hf://org/name@refs/pr/3", "org/name", "refs/pr/3"),
        (Path("hf://org/name@main"), "org/name", "main"),
    ],
)
def test_the_revision_is_asked_for_and_the_commit_told(
    asked: list[Any], model: str | Path, repo: str, revision: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve(model).name == "0123abcd"
    assert [(call[0], call[1]["revision"]) for call in asked] == [(repo, revision)]
    told = capsys.readouterr()
    assert told.err == f"hf://{repo}{'@' + revision if revision else ''} is commit 0123abcd\n"
    assert not told.out  # what a command prints may be piped on


def test_only_weights_configs_and_tokenizers_are_asked_for(asked: list[Any]) -> None:
    from huggingface_hub.utils import filter_repo_objects

    resolve("hf://org/name")
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
    wanted += ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "merges.txt"]
    never = ["pytorch_model.bin", "x.pt", "modeling_x.py", "original/x.safetensors", "x.pkl", "README.md", "x.gguf"]
    never += ["training_args.bin", "onnx/model.onnx", "run.sh", "code/config.json"]
    options = {name: asked[0][1][name] for name in ("allow_patterns", "ignore_patterns")}
    assert sorted(filter_repo_objects(wanted + never, **options)) == sorted(wanted)


@pytest.mark.parametrize(
    "name", ["hf://", "hf://name", "hf://a/b/c", "hf://a/../b", "hf://a/b@", "hf://a/b c", "hf:/../b"]
)
def test_other_names_are_refused(asked: list[Any], name: str) -> None:
    with pytest.raises(ValueError, match="names no model of the hub"):
        resolve(name)
    assert not asked


def _response(code: int) -> Any:
    import inspect

    from huggingface_hub.errors import RepositoryNotFoundError

    response = type("Response", (), {"headers": {}, "status_code": code, "request": None})()
    assert "response" in inspect.signature(RepositoryNotFoundError).parameters
    return response


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ("GatedRepoError", ValueError, "open only to those its owners admit"),
        ("RepositoryNotFoundError", ValueError, "has no model org/name, or it is private"),
        ("RevisionNotFoundError", ValueError, "has no revision 'v9'"),
        ("LocalEntryNotFoundError", FileNotFoundError, "cannot be reached and its cache does not hold"),
        ("", FileNotFoundError, "could not be fetched: a line and another"),
    ],
)
def test_a_failure_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: str, kind: type[Exception], words: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        if not error:
            raise RuntimeError("a line\nand another")
        maker = getattr(huggingface_hub.errors, error)
        raise maker("no") if error.startswith("Local") else maker("no", response=_response(404))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=words) as caught:
        resolve("hf://org/name@v9")
    assert "\n" not in str(caught.value)


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'coterie\[hf\]'"):
        resolve("hf://org/name")


def test_generate_takes_a_name_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(vocab_size=300, max_positions=32, layers=1, dim=8, heads=2, hidden=12)
    model = GPT(config)
    model.init_weights(1)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    save_model(snapshot, model, train_bpe(["some text"], 300))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    wanted = ["--prompt", "some", "--max-new-tokens", "4", "--greedy", "--device", "cpu"]
    main(["generate", "hf://org/name@v1", *wanted])
    by_name = capsys.readouterr()
    main(["generate", str(snapshot), *wanted])
    assert by_name.out == capsys.readouterr().out
    assert by_name.err == "hf://org/name@v1 is commit 0123abcd\n"


@pytest.mark.parametrize("how", ["told to be offline", pytest.param("no way there", marks=pytest.mark.long)])
def test_without_a_network_the_cache_is_read_or_one_sentence_said(tmp_path: Path, how: str) -> None:
    """The library itself, in a process of its own: it reads its settings when it is imported."""
    lost = {"HF_HUB_OFFLINE": "1"} if how == "told to be offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(tmp_path / "home"), **lost}
    script = """
import sys
from coterie.models.hub import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(name))
    except FileNotFoundError as error:
        print("refused:", error)
"""

    def ask(*names: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *names], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert ask("hf://org/name") == [
        "refused: the hub cannot be reached and its cache does not hold all of hf://org/name"
    ]
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file() and "org--name" in str(file)]
    repository, commit = tmp_path / "home" / "hub" / "models--org--name", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    found = ask("hf://org/name", f"hf://org/name@{commit}", "hf://org/name@v2")
    assert found[:2] == [str(snapshot)] * 2
    assert found[2].startswith("refused: the hub cannot be reached")
