"""Token files to batches, through megatron-core's GPTDataset: blends, splits, an order fixed by seed and position.

Shapes: B samples of a micro-batch, S sequence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.tokenizer import Tokenizer
from .config import DataConfig
from .token_files import SCAN_BYTES, TokenFiles, largest_token, open_token_files, quiet_megatron

IGNORE = -100
READY = "ready"


class Batch(NamedTuple):
    """One micro-batch of one rank. Targets are the next tokens, IGNORE where no loss counts; `valid_BS` is False at
    padding, None when there is none."""

    tokens_BS: Tensor
    targets_BS: Tensor
    valid_BS: Tensor | None


class _Vocabulary:
    """What GPTDataset asks of a tokenizer. `unique_identifiers` enters the names of its cached indices."""

    def __init__(self, eos: int | None) -> None:
        self.eod = eos
        self.vocab_size = None
        self.unique_identifiers = {"eos": eos}


def build_datasets(
    config: DataConfig,
    seq_len: int,
    train_samples: int,
    valid_samples: int | None,
    seed: int,
    *,
    vocab_size: int | None = None,
    cache: str | Path | None = None,
) -> tuple[Any, Any]:
    """(training data set, validation data set or None): sequences of dicts that `batches` reads.

    Rank 0 builds the sample indices while the others wait; every rank calls this, with or without torch.distributed.
    A data set of fewer tokens than asked for is repeated, each epoch in another order. The order depends on the seed,
    `seq_len` and `train_samples` (through the number of epochs), never on ranks or batch sizes.

    Args:
        config: Which token files, blended and split how.
        seq_len: Tokens of a sample; its targets reach one further.
        train_samples: Samples of the whole run.
        valid_samples: Samples of one evaluation; None: all there are, once; 0: no validation data.
        seed: Of documents' and samples' order.
        vocab_size: The model's; data with larger ids is refused.
        cache: Folder for the indices when `config.cache` is not set; None: data_cache beside the first prefix.

    Raises:
        FileNotFoundError: Token files, or one of a pair, are missing.
        ValueError: Empty, cut or too short files, wrong weights or split, too large a vocabulary.
    """
    if not config.train:
        raise ValueError("there is no training data: give data.train, the prefixes that `coterie prepare` wrote")
    if train_samples < 1 or seq_len < 1:
        raise ValueError(f"{train_samples} samples of {seq_len} tokens are not a training run: give positive numbers")
    train = [open_token_files(prefix) for prefix in config.train]
    valid = [open_token_files(prefix) for prefix in config.valid] if valid_samples != 0 else []
    eos = _check_vocabulary(config, [*train, *valid], vocab_size)
    shares = _shares(config, valid_samples)
    _check_lengths(train, valid, shares, seq_len)
    key = _key(config, train + valid, seq_len, train_samples, valid_samples, seed)
    folder = Path(config.cache or cache or Path(config.train[0]).parent / "data_cache")
    options = {
        "random_seed": seed,
        "sequence_length": seq_len,
        "tokenizer": _Vocabulary(eos),
        "eod_mask_loss": config.mask_eos,
        **_blend_options(config, train, valid, valid_samples),
    }
    with _group(len(train) > 1 or len(valid) > 1), _cache(folder / key) as path:
        return _build(options, path, shares, train_samples, valid_samples)


def _build(
    options: dict[str, Any], cache: Path, shares: list[tuple[float, float]], train: int, valid: int | None
) -> tuple[Any, Any]:
    gpt = quiet_megatron("gpt_dataset")
    builder = quiet_megatron("blended_megatron_dataset_builder").BlendedMegatronDatasetBuilder
    settings = gpt.GPTDatasetConfig(
        path_to_cache=str(cache),
        reset_position_ids=False,
        reset_attention_mask=False,
        create_attention_mask=False,
        **options,
    )
    if settings.split_matrix is not None:  # build no part that nobody reads
        settings.split_matrix = [shares[0], shares[1] if valid != 0 else None, None]
    built = builder(gpt.GPTDataset, [train, valid, 0], lambda: True, settings).build()
    return built[0], built[1]


def _shares(config: DataConfig, valid_samples: int | None) -> list[tuple[float, float]]:
    """Bounds of train, validation and test among the documents, each from 0 to 1."""
    if config.valid:
        return [(0.0, 1.0), (0.0, 1.0), (1.0, 1.0)]
    try:
        numbers = [float(part) for part in config.split.split(",")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    if not 1 <= len(numbers) <= 3 or min(numbers) < 0 or not 0 < total < math.inf or numbers[0] == 0:
        raise ValueError(f'split "{config.split}" is not three shares, the first above 0, such as "98,2,0"')
    numbers += [0.0] * (3 - len(numbers))
    if numbers[1] == 0 and valid_samples != 0:
        raise ValueError(f'split "{config.split}" leaves no validation data: give it a share, or give data.valid')
    bounds = [sum(numbers[:i]) / total for i in range(4)]
    return [(bounds[i], bounds[i + 1]) for i in range(3)]


def _check_lengths(
    train: list[TokenFiles], valid: list[TokenFiles], shares: list[tuple[float, float]], seq_len: int
) -> None:
    """Refuses a part without one whole sample. (GPTDataset would repeat it, or count epochs of nothing for ever.)"""
    parts = [(files, "training", shares[0]) for files in train]
    parts += [(files, "validation", shares[1]) for files in valid or train if shares[1][0] < shares[1][1]]
    for files, name, (low, high) in parts:
        count = len(files.lengths)
        # The same rounding as megatron-core's.
        tokens = int(files.lengths[round(low * count) : round(high * count)].sum(dtype="int64"))
        if tokens < seq_len + 1:
            raise ValueError(
                f"{files.prefix} has {tokens:,} tokens for {name}, too few for one sample of {seq_len} + 1: "
                "give more data, another split, or a shorter sequence"
            )


def _check_vocabulary(config: DataConfig, files: list[TokenFiles], vocab_size: int | None) -> int | None:
    """The end-of-document id, if a tokenizer tells it. Refuses ids that the model's embedding does not have."""
    beside = [path for f in files if (path := Path(f"{f.prefix}.tokenizer.json")).is_file()]
    for path in beside[1:]:
        if path.read_bytes() != beside[0].read_bytes():
            raise ValueError(f"{beside[0]} and {path} differ: data of two tokenizers cannot be mixed")
    if config.tokenizer and not Path(config.tokenizer).exists():
        raise FileNotFoundError(f"the tokenizer {config.tokenizer} does not exist: give a tokenizer.json")
    path = Path(config.tokenizer) if config.tokenizer else beside[0] if beside else None
    if path is None and config.mask_eos:
        raise ValueError("mask_eos needs to know the end-of-document token: give data.tokenizer")
    tokenizer = None if path is None else Tokenizer(path)
    if vocab_size is None:
        return tokenizer and tokenizer.eos_id
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size:,} tokens but the model's vocabulary {vocab_size:,}: "
            f"set model.vocab_size to at least {tokenizer.vocab_size}, or prepare the data with the model's tokenizer"
        )
    for f in files:
        if (largest := largest_token(f, SCAN_BYTES // len(files))) >= vocab_size:
            raise ValueError(
                f"{f.prefix} holds token {largest:,} but the model's vocabulary ends before {vocab_size:,}: "
                f"set model.vocab_size to at least {largest + 1}, or prepare the data with the model's tokenizer"
            )
    return tokenizer and tokenizer.eos_id


def _weights(name: str, files: list[TokenFiles], weights: Sequence[float]) -> list[float]:
    if weights and (len(weights) != len(files) or not all(0 < w < math.inf for w in weights)):
        raise ValueError(f"{name} {list(weights)} must be one positive number for each of {len(files)} prefixes")
    return list(weights) or [float(f.tokens) for f in files]


def _blend_options(
    config: DataConfig, train: list[TokenFiles], valid: list[TokenFiles], valid_samples: int | None
) -> dict[str, Any]:
    """Megatron's blends. One prefix goes without a weight; several always have weights, because without them a blend
    ends after one epoch."""
    weights = _weights("data.weights", train, config.weights)
    blend = ([f.prefix for f in train], weights if len(train) > 1 else None)
    if not config.valid:
        if valid_samples is None and len(train) > 1:
            raise ValueError("all validation data of a blend's split has no fixed size: give valid_samples")
        return {"blend": blend, "split": config.split}
    held = _weights("data.valid_weights", valid, config.valid_weights) if valid else []
    held = held if len(valid) > 1 and valid_samples is not None else None
    return {"blend_per_split": [blend, ([f.prefix for f in valid], held) if valid else None, None]}


def _key(config: DataConfig, files: list[TokenFiles], *numbers: int | None) -> str:
    """Names the cache folder: data that was prepared anew must not meet the indices of the old."""
    facts = [[f.prefix, f.tokens, len(f.lengths)] for f in files]
    told = json.dumps([facts, config.weights, config.valid_weights, config.split, config.mask_eos, numbers])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _group(needed: bool) -> Iterator[None]:
    """A group of one process where there is none: megatron-core 0.16 asks for its rank when it blends."""
    if not needed or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _cache(path: Path) -> Iterator[Path]:
    """A folder for indices. One that a crash left half written has no READY file, and is made anew."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 and not (path / READY).exists():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    if dist.is_initialized():
        dist.barrier()
    yield path
    if rank == 0:
        (path / READY).touch()


def batches(
    dataset: Any,
    start_sample: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world: int = 1,
    *,
    pad_last: bool = False,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches, `global_batch / (micro_batch * world)` for each step, until the data set ends.

    Step n covers the samples start_sample + n * global_batch + [0, global_batch) on any number of ranks: rank r has
    the r-th part of them, in order.

    Args:
        start_sample: Samples consumed before.
        global_batch: Samples of one step over all ranks.
        micro_batch: Samples of one forward pass on one rank.
        pad_last: Fill up the last step with padding instead of leaving it out (evaluation of every sample once).
        vocab_size: Check every id against it.

    Raises:
        ValueError: Batch sizes that do not divide; an id outside the vocabulary.
    """
    if min(global_batch, micro_batch, world) < 1 or global_batch % (micro_batch * world):
        raise ValueError(
            f"a global batch of {global_batch} samples is not a multiple of {micro_batch} a rank x {world} ranks"
        )
    part, count = global_batch // world, len(dataset)
    for step in range(start_sample, count if pad_last else count - global_batch + 1, global_batch):
        for first in range(step + rank * part, step + (rank + 1) * part, micro_batch):
            batch = _stack([dataset[i] if i < count else None for i in range(first, first + micro_batch)], dataset)
            if vocab_size is not None:
                _check_ids(batch, vocab_size)
            yield batch


def _check_ids(batch: Batch, vocab_size: int) -> None:
    """A sample's last target is no token of it, so both are looked at."""
    low, high = batch.tokens_BS.aminmax()
    largest = max(int(high), int(batch.targets_BS.max()))
    if low < 0 or largest >= vocab_size:
        found = int(low) if low < 0 else largest
        raise ValueError(f"the data holds token {found:,}, outside the model's vocabulary of {vocab_size:,}")


def _stack(samples: list[dict[str, Tensor] | None], dataset: Any) -> Batch:
    """None is a sample of padding."""
    like = next((s for s in samples if s is not None), None) or dataset[0]
    empty = torch.zeros_like(like["tokens"])
    tokens_BS = torch.stack([empty if s is None else s["tokens"] for s in samples])
    targets = [
        torch.full_like(empty, IGNORE) if s is None else s["labels"].masked_fill(s["loss_mask"] == 0, IGNORE)
        for s in samples
    ]
    valid_BS = None
    if any(s is None for s in samples):
        valid_BS = torch.stack([torch.full_like(empty, s is not None, dtype=torch.bool) for s in samples])
    return Batch(tokens_BS, torch.stack(targets), valid_BS)
