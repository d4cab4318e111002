"""Benchmarks of the encoder and of each operation, against what people would otherwise use."""
