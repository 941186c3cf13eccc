"""The torch side of a bundle, and what can be said of a backbone without torch."""
