"""Run one real rank of a run of any size, and compare it with the plan."""
