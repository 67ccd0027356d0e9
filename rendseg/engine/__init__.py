"""engine of rendseg."""
