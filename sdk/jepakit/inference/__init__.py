"""A bundle's graph opened in a runtime: arrays in, arrays out. No torch."""
