"""The modules of a Mixture-of-Experts layer."""

# Attribute that marks a three-axis parameter as a stack of matrices, each a linear map of its own.
STACK = "is_stack_of_matrices"
