"""Training of the projection: data, packing, trainer."""
