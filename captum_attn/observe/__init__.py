"""Observes attention in the user's own model: tap, wiring, token maps, readout, map back."""
