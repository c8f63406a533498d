"""Training of the projection: batches, packing, the published recipe and its extension."""
