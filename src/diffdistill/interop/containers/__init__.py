"""What foreign checkpoints are packed in: archives, pickles read as data, tensors that are still to be read."""
