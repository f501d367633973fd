"""Text into tokens: readers of files of text, tokenising in worker processes, Megatron's .bin/.idx, their record."""
