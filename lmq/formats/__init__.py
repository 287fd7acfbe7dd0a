"""How a weight matrix is stored: configurations, groups with their grids, packing, and products with packed weights."""
