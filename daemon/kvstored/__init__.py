"""kvstored: the daemon. gRPC in front of a `kvstore.Store`."""
