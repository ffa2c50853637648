"""Between AnnData and tensors: matrices to batches, models to plain arrays and back."""
