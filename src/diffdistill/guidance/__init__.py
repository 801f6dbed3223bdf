"""Stage 1: a guided model, which costs two evaluations a step, becomes one that takes w (Meng et al. 2023)."""
