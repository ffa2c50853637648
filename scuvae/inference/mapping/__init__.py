"""What new cells need: a map, batches, labels, and the parts of novelty."""
