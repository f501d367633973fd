"""Every upstream symbol that is wrapped, and why."""
