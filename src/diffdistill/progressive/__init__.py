"""Stage 2, models of few steps: by halving (Meng et al. 2023; Salimans and Ho 2022), or in one round (`methods`)."""
