"""The federation: many data owners, one set of adapters, on Flower."""
