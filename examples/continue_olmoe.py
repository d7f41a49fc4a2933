"""Take an OLMoE from transformers, train it further with coterie, and give it back to transformers.

    python examples/continue_olmoe.py                         # trains on the sources of Python's standard library
    python examples/continue_olmoe.py wikitext-2/train.txt    # or on any text, .gz too

The checkpoint is a tiny one with random weights, made here, so that nothing is downloaded and a laptop needs minutes.
With a real one, put its directory in the place of `olmoe` below and its tokenizer.json in that of `tokenizer`.
Needs `pip install "coterie[train,hf]"`.
"""

import argparse
from pathlib import Path

import torch
import transformers

from coterie.cli import main as coterie
from coterie.models.weights import load_model
from coterie.train.corpus import stdlib_corpus, write_corpus
from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare

VOCABULARY, LENGTH = 4096, 128
PROMPT = "The first thing that "


def make_tokens(texts: list[str], folder: Path) -> Path:
    """Trains a tokenizer on the text and writes its tokens; returns their prefix."""
    split = "line" if texts else "file"  # validation needs several documents
    if not texts:
        texts = [str(write_corpus(folder / "text", stdlib_corpus())[0])]
    prepare(texts, folder / "train", train_vocab=VOCABULARY, split=split, force=True, quiet=True)
    return folder / "train"


def make_checkpoint(folder: Path, tokenizer: Path) -> Path:
    """Writes what a download would bring: config.json, model.safetensors and tokenizer.json."""
    torch.manual_seed(1234)
    config = transformers.OlmoeConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=128,
        intermediate_size=64,  # of one expert
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,  # else its row is zeros, and norms of zeros have huge gradients
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def train(olmoe: Path, data: Path, run: Path, steps: int) -> Path:
    """Goes on from the checkpoint; an interrupted run goes on from where it was. Returns the trained model.

    Rates of a real checkpoint are lower: the recipe's own ones are a start, leave out the two --optim.*lr then.
    """
    batch = 16
    words = ["pretrain", "continue", "--init", olmoe, "--run-dir", run, "--data.train", data]
    words += ["--seq-len", LENGTH, "--batch-size", batch, "--micro-batch", 0, "--steps", steps]
    words += ["--optim.lr", 2e-3, "--optim.min-lr", 2e-4, "--optim.warmup-tokens", steps // 10 * batch * LENGTH]
    words += ["--eval-every", 0, "--eval-batches", 16, "--log.every", max(1, steps // 10)]
    words += ["--parallel.dtype", "float32", "--parallel.recompute", "none", "--checkpoint.every", 0]
    try:
        coterie([str(word) for word in words])
    except SystemExit as end:  # as from a terminal; 0 is success
        if end.code:
            raise
    return run / "model"


def compare(ours: Path, theirs: Path) -> float:
    """How far the logits of one model in coterie and in transformers are apart: RMS of the difference over RMS."""
    other = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, others = load_model(ours).eval()(tokens).logits_BSV, other(tokens).logits
    return float((mine - others).square().mean().sqrt() / others.square().mean().sqrt())


def write_on(folder: Path) -> str:
    """Text from transformers' own generate."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(prompt, max_new_tokens=40, do_sample=False)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="text files; none: Python's own sources")
    parser.add_argument("--folder", type=Path, default=Path("runs/continue_olmoe"), help="where all results go")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.disable_progress_bar()

    print("1/5  Text to tokens", flush=True)
    data = make_tokens(given.texts, given.folder)
    print(f"     {Path(f'{data}.bin').stat().st_size // 2:,} tokens of a vocabulary of {VOCABULARY:,}")

    print("2/5  An OLMoE with random weights, as transformers writes it", flush=True)
    tokenizer = Path(f"{data}.tokenizer.json")
    olmoe = make_checkpoint(given.folder / "olmoe", tokenizer)
    print(f"     {olmoe}; logits in coterie and in transformers differ by {compare(olmoe, olmoe):.1e}")

    print("3/5  Training goes on from it", flush=True)
    model = train(olmoe, data, given.folder / "run", given.steps)
    rows = read_metrics(given.folder / "run")
    if rows[-1]["step"] < given.steps:
        raise SystemExit("stopped: the same command goes on from there")
    print(f"     loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}, validation {rows[-1]['valid_loss']:.3f}")

    print("4/5  Back to transformers", flush=True)
    back = given.folder / "trained"
    coterie(["convert", str(model), str(back), "--to", "hf", "--force"])

    print("5/5  Opened there", flush=True)
    apart = compare(model, back)
    print(
        f"     {type(transformers.AutoModelForCausalLM.from_pretrained(back)).__name__}, logits differ by {apart:.1e}"
    )
    if apart > 1e-5:
        raise SystemExit("the two models do not say the same")
    print(f"     {write_on(back)!r}")


if __name__ == "__main__":
    main()
