"""Import and export Hugging Face folders tensor by tensor; only tokenizers need transformers."""
