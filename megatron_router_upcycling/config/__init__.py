"""What is configured: YAML files, flags, routers and starts, and a checkpoint's record of them."""
