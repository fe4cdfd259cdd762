"""`fedsea demo`: split inference, shown on a real model."""


def demo() -> None:
    """Show it all on this machine."""
