"""One real rank of a run of any size, beside its plan."""
