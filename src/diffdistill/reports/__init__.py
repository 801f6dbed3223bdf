"""Results as text and as plots: what tables, comparisons and training runs share."""
