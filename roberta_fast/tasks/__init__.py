"""What a task makes of a model's logits, shared by serving and evaluation."""
