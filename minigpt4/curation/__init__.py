"""A second-stage data set of one's own: generate, refine, filter, review. See docs/curation.md."""
