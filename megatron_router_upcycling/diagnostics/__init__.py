"""What a run's routers do: statistics while training, the report over runs, and the look before training."""
