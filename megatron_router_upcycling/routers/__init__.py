"""The routers: kinds, their mathematics, and the modules that train them."""
