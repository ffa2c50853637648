"""q of single cells, the decoder frozen."""
