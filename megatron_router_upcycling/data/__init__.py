"""Text into tokens: files read, tokenised in worker processes, written as Megatron's .bin and .idx."""
