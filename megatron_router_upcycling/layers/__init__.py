"""What a Mixture-of-Experts layer is made of here."""
