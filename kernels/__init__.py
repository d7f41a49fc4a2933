"""One operation a file, its reference beside it. These files know tensors and nothing else."""
