"""The examples run as a newcomer types them, on little text and for few steps."""

import argparse
import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("megatron.core", reason="needs the extra train")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.long
def test_continue_olmoe(tmp_path: Path) -> None:
    text = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, typing))
    (tmp_path / "text.txt").write_text(text)
    command = [sys.executable, str(EXAMPLES / "continue_olmoe.py"), "text.txt", "--steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    assert "5/5  Opened there\n     OlmoeForCausalLM, logits differ by" in done.stdout
    assert (tmp_path / "runs" / "continue_olmoe" / "trained" / "config.json").exists()
