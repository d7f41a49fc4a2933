"""The command: what is wrong is said in one sentence, with exit status 2, before any work."""

import subprocess
import sys

import pytest

pytest.importorskip("tyro", reason="the command needs tyro")
from coterie import cli

WRONG = {
    "no such model": (["generate", "nowhere", "--prompt", "x"], "nowhere"),
    "not a model": (["generate", ".", "--prompt", "x"], "not a model directory"),
    "no such run": (["report", "nowhere"], "nowhere"),
    "no input": (["prepare", "nowhere.txt", "--output", "out", "--train-vocab", "300"], "nowhere.txt"),
    "no tokenizer named": (["prepare", __file__, "--output", "out"], "tokenizer"),
    "no ranks": (["pretrain", "tiny", "--ranks", "0"], "--ranks 0"),
    "ranks that are no number": (["pretrain", "tiny", "--ranks", "two"], "--ranks 'two'"),
    "a temperature below zero": (["generate", ".", "--prompt", "x", "--temperature", "-1"], "temperature"),
}


@pytest.mark.parametrize(("argv", "said"), WRONG.values(), ids=WRONG)
def test_one_sentence_and_status_two(argv, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("coterie: ")
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.parametrize("argv", [["bench", "nothing"], ["serve", "x"], [], ["generate", "x", "--nonsense", "1"]])
def test_the_parser_refuses_what_does_not_exist(argv, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_lists_every_command_and_no_other(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("quickstart", "prepare", "pretrain", "generate", "report", "bench"))
    assert "serve" not in shown


def test_pretrain_hands_its_error_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coterie.cli", "pretrain", "tinny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "tiny" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_traceback_can_be_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("COTERIE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["generate", "nowhere", "--prompt", "x"])


def test_ranks_may_stand_anywhere(monkeypatch) -> None:
    ran: list[tuple] = []
    monkeypatch.setattr("coterie.train.launch.launch", lambda *given: ran.append(given) or 0)
    for argv in (["--ranks", "3", "tiny", "--steps", "1"], ["tiny", "--steps", "1", "--ranks=3"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["pretrain", *argv])
        assert left.value.code == 0
    assert ran == [(3, ["tiny", "--steps", "1"])] * 2


def test_import_of_the_layer_needs_torch_alone() -> None:
    blocked = "('tyro', 'megatron', 'transformers', 'tokenizers', 'safetensors', 'rich', 'matplotlib')"
    code = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] in {blocked}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import coterie.moe.layer, coterie.models.gpt\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
