"""Strategies beside Flower's stock ones: one file each, with a subclass of one of Flower's that has a `name`."""
