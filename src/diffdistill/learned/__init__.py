"""Training the predictors of learned solvers, and their files."""
