"""More experts of a trained Mixture-of-Experts: a conversion that names the experts' bytes again."""
