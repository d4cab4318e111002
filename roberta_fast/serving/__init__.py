"""``roberta-fast serve``: a model over HTTP, batched by real tokens."""
