"""The gRPC front of a driver: an edge knows `cluster.request.Generator`, and nothing behind it."""
