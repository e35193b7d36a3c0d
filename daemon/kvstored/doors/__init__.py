"""Where calls come in: the gRPC services, and the lease socket for clients on this host."""
