"""One file for each framework, which holds tables alone."""
