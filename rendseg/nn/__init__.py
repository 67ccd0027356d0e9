"""nn of rendseg."""
