"""models of rendseg."""
