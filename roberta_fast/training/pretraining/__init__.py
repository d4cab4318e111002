"""Pretraining: text into tokens, tokens into masked blocks, blocks into a model."""
