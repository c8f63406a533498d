"""Training of the projection: batches, packing, the published recipe and that of small models."""
