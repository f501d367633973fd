"""Hugging Face folders in and out, tensor by tensor, without building a model and without transformers."""
