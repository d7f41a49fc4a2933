"""The command: what is wrong is said in one sentence, with exit status 2, before any work."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the command needs tyro")
from coterie import cli
from coterie.benchmarks.serving_load import Load
from coterie.infer.placement import Cluster

WRONG = {
    "no such model": (["generate", "nowhere", "--prompt", "x"], "nowhere"),
    "not a model": (["generate", ".", "--prompt", "x"], "not a model directory"),
    "no such run": (["report", "nowhere"], "nowhere"),
    "no input": (["prepare", "nowhere.txt", "--output", "out", "--train-vocab", "300"], "nowhere.txt"),
    "no tokenizer named": (["prepare", __file__, "--output", "out"], "tokenizer"),
    "no address": (["bench", "serve", "--url", "nowhere"], "--url 'nowhere'"),
    "no length": (["bench", "serve", "--url", "http://h", "--new", "many"], "--new 'many'"),
    "no ranks": (["pretrain", "tiny", "--ranks", "0"], "--ranks 0"),
    "restarts below zero": (["pretrain", "tiny", "--restarts", "-1"], "--restarts '-1' is not a number of restarts"),
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


@pytest.mark.parametrize(
    "argv",
    [
        ["bench", "nothing"],
        ["bench"],
        ["bench", "layer", "--netns"],
        ["serve", "x"],
        [],
        ["generate", "x", "--nonsense", "1"],
    ],
)
def test_the_parser_refuses_what_does_not_exist(argv, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_serve_refuses_before_the_model_is_read(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("COTERIE_API_KEYS", raising=False)
    for argv, words in (
        (["--host", "0.0.0.0"], "no API key is set"),
        (["--keys-file", str(tmp_path / "none")], "cannot be read"),
        ([], "there is no"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["serve", str(tmp_path / "absent"), *argv])
        assert left.value.code == 2
        assert words in capsys.readouterr().err


def test_help_lists_every_command_and_no_other(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("quickstart", "prepare", "pretrain", "generate", "serve", "report", "bench")
    )
    assert "• train" not in shown


@pytest.mark.parametrize(
    ("argv", "called", "given"),
    [
        (["layer", "--quick"], "layer.main", {"json": None, "quick": True}),
        (["train"], "train.main", {"json": None, "quick": False}),
        (["alltoall", "--netns", "--json", "f"], "alltoall.main", {"json": Path("f"), "quick": False, "netns": True}),
        (["plan"], "plan.main", {"json": None, "quick": False}),
        (["plan", "--netns", "--quick"], "plan_hosts.main", {"json": None, "quick": True}),
        (["layouts"], "layouts.main", {"json": None, "quick": False}),
        (["load"], "loading.main", {"json": None, "quick": False}),
        (
            ["placement", "--routes", "f", "--nodes", "3"],
            "placement.main",
            {"json": None, "quick": False, "routes": Path("f"), "cluster": Cluster(3, 4, 9), "html": None},
        ),
    ],
)
def test_each_benchmark_has_flags_of_its_own(argv, called, given, monkeypatch) -> None:
    ran: list[dict] = []
    monkeypatch.setattr(f"coterie.benchmarks.{called}", lambda **more: ran.append(more))
    cli.main(["bench", *argv])
    assert ran == [given]


def test_bench_serve_takes_many_flags(monkeypatch) -> None:
    ran: list[Load] = []
    monkeypatch.setattr("coterie.benchmarks.serving.main", ran.append)
    words = "--url http://h:1 --prompt 8 --concurrency 1 4 --rate --beside a b --no-ignore-eos"
    cli.main(["bench", "serve", *words.split()])
    beside = (Path("a"), Path("b"))
    assert ran == [Load("http://h:1", prompt="8", concurrency=(1, 4), rate=(), beside=beside, ignore_eos=False)]


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
    one = ["--ranks", "3", "tiny", "--restarts", "2", "--steps", "1"]
    for argv in (one, ["tiny", "--steps", "1", "--restarts=2", "--ranks=3"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["pretrain", *argv])
        assert left.value.code == 0
    assert ran == [(3, ["tiny", "--steps", "1"], 2)] * 2


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


def test_an_engine_starts_without_what_it_does_not_use() -> None:
    """Each takes a third of a second and more to import."""
    code = (
        "import sys, coterie.infer.engine\n"
        "late = ('torch.distributed.tensor', 'transformers', 'megatron', 'llguidance')\n"
        "sys.exit(', '.join(name for name in late if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
