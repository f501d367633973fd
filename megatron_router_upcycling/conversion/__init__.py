"""Convert a dense checkpoint into an upcycled one: plan, then execute chunk by chunk."""
