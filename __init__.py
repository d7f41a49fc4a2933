"""coterie: train, compress, align and serve Mixture-of-Experts language models."""

import os
import sys

__version__ = "0.1.0"

# The checkout's root is this package. `python -m coterie.x` puts that root on sys.path, where our
# folders would stand in for packages of the same name (Hugging Face ships one called `kernels`).
_root = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [p for p in sys.path if os.path.realpath(p or os.curdir) != _root]


def __getattr__(name: str):
    """`coterie.pipeline`; torch is imported when it is first asked for."""
    if name == "pipeline":
        from .infer.pipeline import pipeline

        return pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
