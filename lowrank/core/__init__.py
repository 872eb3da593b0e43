"""Ground floor: names, trees, keys, specs. Knows arrays, knows no model."""
