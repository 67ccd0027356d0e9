"""data of rendseg."""
