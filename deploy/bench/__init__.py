"""The load generator behind `headwise bench serve`. Knows the SDK; neither torch nor ray."""
