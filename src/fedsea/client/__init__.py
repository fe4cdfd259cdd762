"""The client: both ends of the model, and the connection to its middle."""
