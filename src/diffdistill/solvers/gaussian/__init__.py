"""Gaussians as models of the data: their statistics, and the analytic start that follows from them."""
