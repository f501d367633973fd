"""Zero-shot evaluation on the paper's ten tasks by lm-evaluation-harness (the ``eval`` extra)."""
