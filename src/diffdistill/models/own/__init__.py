"""Networks that a user brings: under a name, behind an adapter, as denoisers."""
