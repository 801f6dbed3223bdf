"""Stage 2: a model of N steps becomes one of N / 2, down to 1 (Meng et al. 2023; Salimans and Ho 2022)."""
