"""What a Mixture-of-Experts layer is made of here."""

# Attribute of a parameter of three axes that is a stack of matrices, each a linear map of its own.
STACK = "is_stack_of_matrices"
