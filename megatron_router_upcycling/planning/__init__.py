"""A run on paper: parameters, memory, time, communication, and what is wrong with its layout."""
