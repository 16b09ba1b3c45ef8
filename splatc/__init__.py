"""splatc."""
