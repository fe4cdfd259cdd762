"""What a provider can read of a text: attacks on what crosses the wire, and how they are scored."""
