"""Slow, plain implementations that the package is held against: loops over numbers, written from the paper.

They share no code with the package: of ``RouterConfig`` and ``InitConfig`` they read the fields alone.
"""
