"""Import and export Hugging Face folders tensor by tensor: no model is built; tokenizers use transformers."""
