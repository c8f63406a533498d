"""Your own second-stage data: generate, refine, filter, review. See docs/curation.md."""
