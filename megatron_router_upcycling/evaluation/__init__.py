"""Zero-shot evaluation of a Hugging Face model on the paper's ten tasks, beside the paper's table 1.

The tasks are asked by lm-evaluation-harness (the ``eval`` extra); what is here says which tasks, where their
data comes from, which metric counts, and how the averages are made.
"""
