"""A converted checkpoint → a checkpoint of a stock architecture that has sinks of its own."""
