"""Tables of the papers: rows, columns, published values, and the cells that are measured for them."""
