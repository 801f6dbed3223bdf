"""Files that are written whole or not at all, with hashes, records and archives of arrays."""
