"""Everything a training run can be told. Recipes fill these in; every leaf is a flag of the entries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Which token files a run reads: prefixes of .bin/.idx pairs, as `coterie prepare` writes them."""

    train: tuple[str, ...] = ()
    """Prefixes; several are blended."""
    weights: tuple[float, ...] = ()
    """How often each prefix is drawn, relative to the others; (): by the number of tokens."""
    valid: tuple[str, ...] = ()
    """Prefixes held out for validation; (): the second part of `split`."""
    valid_weights: tuple[float, ...] = ()
    """As `weights`, for `valid`."""
    split: str = "98,2,0"
    """Shares of train, validation and test among the documents of `train`; unused when `valid` is given."""
    tokenizer: str = ""
    """A tokenizer.json; "": the one beside the first prefix (PREFIX.tokenizer.json), if it is there."""
    cache: str = ""
    """Folder of the sample indices; "": `data_cache` in the run directory."""
    mask_eos: bool = False
    """Leave the prediction that follows an end-of-document token out of the loss."""
