"""What a training run writes about itself: run.jsonl and routing.jsonl."""
