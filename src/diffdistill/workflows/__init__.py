"""What the commands do, as functions of Python: each takes models and data as they are, and returns what it made."""
