"""From a model's name to images: how it is to be sampled, and sets of samples."""
