"""One batch of prompts, token by token, with a dense cache. Serving many requests is another file's work.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..models.gpt import GPT
from ..models.hub import resolve
from ..models.tensor_files import has_weights
from ..models.tokenizer import TextStream, Tokenizer
from ..models.weights import load_model
from .cache import DenseCache
from .sampler import check_sampling, sample


def generate(
    model: GPT,
    tokens_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yields the next ids, (B,) int64, one step at a time. Puts the model into eval mode.

    Args:
        model: on the device of its parameters.
        tokens_BS: prompts of one length.
        max_new_tokens: how many steps at most.
        temperature, top_k, top_p: see `sample`; temperature 0 is greedy.
        seed: of this call's own generator; global randomness is neither read nor changed.
        eos_id: a sequence that gave it, or one of them, gives it, or the first, for ever; the iterator ends when
            all have.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, a setting that means nothing, or more tokens
            than the model has positions.
    """
    config = model.config
    check_sampling(temperature, top_k, top_p)
    if tokens_BS.dim() != 2:
        raise ValueError(f"prompts of shape {list(tokens_BS.shape)} are not (batch, tokens): give a row for each")
    batch, prompt = tokens_BS.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be 1 or more")
    if not batch or not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    if prompt + max_new_tokens > config.max_positions:
        raise ValueError(
            f"{prompt} prompt tokens and {max_new_tokens} new ones pass the model's {config.max_positions} "
            "positions: shorten the prompt or ask for fewer"
        )
    for token in (int(tokens_BS.min()), int(tokens_BS.max())):
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"a prompt has token id {token}, outside the model's vocabulary of {config.vocab_size}")
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int) else list(eos_id)
    return _steps(model, tokens_BS, max_new_tokens, (temperature, top_k, top_p), seed, ends)


def _steps(
    model: GPT,
    tokens_BS: Tensor,
    steps: int,
    sampling: tuple[float, int, float],
    seed: int,
    ends: list[int],
) -> Iterator[Tensor]:
    model.eval()
    weight = model.embed.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    batch, prompt = tokens_BS.shape
    cache = DenseCache(model.config, batch, prompt + steps, device=weight.device, dtype=weight.dtype)
    feed_BS = tokens_BS.to(weight.device)
    ended_B = torch.zeros(batch, dtype=torch.bool, device=weight.device)
    ends_N = torch.tensor(ends, dtype=torch.int64, device=weight.device)
    for _ in range(steps):
        # Inside the loop, not around it: a generator that yields in inference mode would leave its caller in it.
        with torch.inference_mode():
            logits_BSV = model(feed_BS, cache=cache, logits_to_keep=1).logits_BSV
            cache.advance(feed_BS.shape[1])
            if cache.length == prompt and not bool(logits_BSV.isfinite().all()):
                raise ValueError("the model's logits are not finite: its weights are damaged, or dtype is too narrow")
            next_B = sample(logits_BSV[:, -1], *sampling, generator)
            if ends:
                next_B = torch.where(ended_B, ends[0], next_B)
                ended_B = ended_B | torch.isin(next_B, ends_N)
            feed_BS = next_B[:, None]
        yield next_B
        if ends and bool(ended_B.all()):
            return


def open_model(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer | None]:
    """The model of a model directory, or of a run directory's `model/`, and its tokenizer if it has one.

    Args:
        path: the directory, or hf://org/name[@revision].
        device: None: cuda where there is one, else cpu.
        dtype: None: as stored.

    Raises:
        FileNotFoundError: the directory holds no model; the message says what was found instead.
        ValueError: its files do not fit together, or there is no such device.
    """
    at = _device(device)  # before anything is fetched
    folder = _model_folder(resolve(path))
    # The small file first: a damaged one is told before the weights are read.
    tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return load_model(folder, device=at, dtype=dtype).eval(), tokenizer


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one of cpu, cuda") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def _model_folder(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: give a model directory or a run directory")
    for folder in (path, path / "model"):
        if has_weights(folder):
            return folder
    if (path / "metrics.jsonl").exists() or (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"the run in {path} has not written its model/ yet: it does so at its end, so resume it and let it finish"
        )
    pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    why = f", and {pickles[0].name} is a pickle, which is never opened" if pickles else ""
    raise FileNotFoundError(f"{path} is not a model directory: it has no model.safetensors{why}")


def stream_text(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    device: str | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the text that continues `prompt`, until the model ends the document or `max_new_tokens` are out.

    An empty prompt starts a new document. This call itself refuses, before any piece is asked for.

    Raises:
        FileNotFoundError, ValueError: as `open_model` and `generate`; or the model has no tokenizer.
    """
    check_sampling(temperature, top_k, top_p)
    model, tokenizer = open_model(path, device=device)
    if tokenizer is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json beside its model, so text cannot be read")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # how Python hands over bytes of a command line that are no UTF-8
        raise ValueError("the prompt is not UTF-8 text: change its encoding") from None
    ids = tokenizer.encode_prompt(prompt) or [tokenizer.eos_id]
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens_BS = torch.tensor([ids])
    steps = generate(model, tokens_BS, max_new_tokens, **settings, seed=seed, eos_id=tokenizer.eos_ids)
    return _pieces(steps, tokenizer, ids)


def _pieces(steps: Iterator[Tensor], tokenizer: Tokenizer, prompt: list[int]) -> Iterator[str]:
    stream = TextStream(tokenizer, prompt)
    for next_B in steps:
        token = int(next_B[0])
        if token not in tokenizer.eos_ids:
            yield stream.push(token)
    yield stream.finish()
