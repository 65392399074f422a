"""Measured side by side: methods (`quality`), and training against other trainers (`speed`)."""
