"""Hand-derived backwards over calls of torch, for any device."""
